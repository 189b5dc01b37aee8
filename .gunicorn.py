"""How gunicorn serves, beyond the settings of config.py; `python run.py` takes it from here."""

import logging

from greenlet import GreenletExit

worker_class = "gevent"
keepalive = 5  # seconds for a client to send its next head
graceful_timeout = 12  # seconds from SIGTERM to the end of everything
control_socket_disable = True


@logging.getLogger("gunicorn.error").addFilter
def discreet(record):
    """Cut what gunicorn quotes of a malformed request off its line, it may hold a password; drop what is no error."""
    if str(record.msg).startswith("Invalid request from"):
        record.msg = record.msg.partition(": ")[0]
    return not record.exc_info or record.exc_info[0] is not GreenletExit  # an idle connection, at the very end


def post_fork(server, worker):
    """Let a worker break off what is under way, which stores what streams have said, before the master kills it.

    It checks once a second, and would wait as long as the master does.
    """
    worker.cfg.set("graceful_timeout", graceful_timeout - 4)
