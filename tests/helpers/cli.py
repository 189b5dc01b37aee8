"""The application's commands, run in this process."""


def invoke(app, *arguments, input=None):
    """Run a command with a standard input; return its exit status and the lines of its output and of its errors."""
    result = app.test_cli_runner().invoke(args=arguments, input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()
