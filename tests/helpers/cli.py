"""The application's commands, run in this process."""


def invoke(app, *arguments):
    """Run a command; return its exit status and the lines of its output and of its errors."""
    result = app.test_cli_runner().invoke(args=arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()
