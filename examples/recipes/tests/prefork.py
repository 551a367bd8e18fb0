"""Runs ``python -m MODULE`` in forks of one process that has imported everything.

Importing torch and its like takes most of the seconds of a short job. ``serve SOCKET`` imports once
and waits; ``-m MODULE ARGUMENTS``, with the socket in BAPNAL_PREFORK, runs there with the files and
the folder of the process that asks, which ends with the module's exit code.
"""

import json
import os
import socket
import sys


def serve(path):
    import runpy
    import signal
    import traceback

    from bapnal_recipes.voc2012 import (  # noqa: F401
        evaluate,
        generate_labels,
        search,
        tables,
        train_classifier,
        train_segmentation,
    )

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            client, _ = server.accept()
            message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
            if os.fork():
                client.close()
                for number in files:
                    os.close(number)
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for target, number in enumerate(files):
                os.dup2(number, target)
            folder, module, *sys.argv[1:] = json.loads(message)
            os.chdir(folder)
            code = 0
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            client.sendall(bytes([code & 255]))
            os._exit(0)


def ask(arguments):
    assert arguments[0] == "-m"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.environ["BAPNAL_PREFORK"])
        message = json.dumps([os.getcwd(), *arguments[1:]]).encode()
        socket.send_fds(client, [message], [0, 1, 2])
        return (client.recv(1) or b"\1")[0]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1:]))
