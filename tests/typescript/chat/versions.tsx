/** Buttons that show the version of a message before and after this one. */
export function Versions(props: { id: string; versions?: number[]; show: (id: number) => void }) {
  const { versions = [], show } = props;
  const index = versions.indexOf(Number(props.id));
  if (index < 0) return null;
  return (
    <span className="versions">
      <button aria-label="Previous version" disabled={index === 0} onClick={() => show(versions[index - 1]!)}>
        ‹
      </button>
      {` ${index + 1}/${versions.length} `}
      <button aria-label="Next version" disabled={!versions[index + 1]} onClick={() => show(versions[index + 1]!)}>
        ›
      </button>
    </span>
  );
}
