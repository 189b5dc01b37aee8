/** What a browser has and Node lacks: a cookie jar, and URLs relative to the server. */

declare const process: { env: Record<string, string | undefined> };

export const API = process.env.API ?? "http://127.0.0.1:5000";

const fetchWithoutCookies = globalThis.fetch;
let cookie = "";

globalThis.fetch = async (input, init) => {
  const request = new Request(input instanceof Request ? input : new URL(input, API), init);
  if (cookie) request.headers.set("Cookie", cookie);
  const response = await fetchWithoutCookies(request);
  cookie = response.headers.getSetCookie()[0]?.split(";")[0] ?? cookie;
  return response;
};

export function check(condition: boolean, message: string): void {
  if (!condition) throw new Error(message);
}
