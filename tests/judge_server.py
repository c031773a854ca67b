"""A judge on this machine: a server of the OpenAI chat protocol that answers as a test's script says."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, refusal=None, ending="stop"):
    """A response of the protocol, with 100 prompt tokens and 10 completion tokens."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choices = [{"index": 0, "message": message, "finish_reason": ending}]
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m-1",
        "choices": choices,
        "usage": usage,
    }


def score(number):
    return completion(json.dumps({"reason": "so", "verdict": number}))


def winner(word):
    return completion(json.dumps({"reason": "so", "verdict": word}))


def texts(body):
    """What a request quotes."""
    return json.loads(body["messages"][1]["content"])


class Server:
    """Keeps every request.

    Attributes:
        script: takes a request's body and returns a status and the response's content (an object, bytes, or an
            iterator that sends them one after another), and maybe headers; None sends no response.
        requests: the bodies, in the order of their coming; ``times_s`` when each came, ``keys`` what authorized it.
        in_flight: the largest number of requests under way at a time.
    """

    def __init__(self, script):
        self.script, self.requests, self.times_s, self.keys = script, [], [], []
        self.under_way = self.in_flight = 0
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(script):
    """A scripted server, with its ``url``."""
    state = Server(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body)
                state.times_s.append(time.monotonic())
                state.keys.append(self.headers["Authorization"])
                state.under_way += 1
                state.in_flight = max(state.in_flight, state.under_way)
            answer = state.script(body)
            with state.lock:
                state.under_way -= 1
            if answer is None:
                self.close_connection = True
                return
            status, content, *headers = answer
            payload = json.dumps(content).encode() if isinstance(content, dict) else content
            parts, size = ([payload], len(payload)) if isinstance(payload, bytes) else (payload, 10**6)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(size))
                for name, value in headers[0].items() if headers else ():
                    self.send_header(name, value)
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
