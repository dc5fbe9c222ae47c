"""A small server of the completions protocol by token ids, as vLLM speaks it, with a real model behind it.

It samples with a model of its own, so that its log-probabilities are true, and knows adapters only by what it was told
to load. Faults are put in by tests: `status` and `silence` for whole answers, `spoil` for what an answer says.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # a rollout asks all at once; of the five by default the rest are turned away under load


class CompletionStub:
    """The server.

    Args:
        model: a causal language model; with adapters a peft model.
        name: of the model without adapter.
    """

    def __init__(self, model: Any, name: str = "base") -> None:
        self.model, self.name = model.eval(), name
        self.adapters: dict[str, tuple[dict[str, torch.Tensor], float]] = {}
        self.asked: list[dict[str, Any]] = []
        self.status: list[int] = []  # of the next answers to completions; empty: all is well
        self.silence = 0.0  # seconds before each answer
        self.spoil: Callable[[dict], None] = lambda answer: None
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                self.reply(200, {"data": [{"id": name} for name in [stub.name, *stub.adapters]]})

            def do_POST(self):  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(stub.silence)
                with stub.lock:
                    self.reply(*stub.answer(self.path, body))

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        if path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            settings = json.loads((folder / "adapter_config.json").read_text())
            scale = settings["lora_alpha"] / settings["r"]
            self.adapters[body["lora_name"]] = (load_file(folder / "adapter_model.safetensors"), scale)
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, {}
        self.asked.append(body)
        if self.status:
            return self.status.pop(0), {"error": "out of order"}
        if body["model"] not in (self.name, *self.adapters):
            return 404, {"error": f"the model {body['model']} does not exist"}
        answer = self.complete(body)
        self.spoil(answer)
        return 200, answer

    @torch.no_grad()
    def complete(self, body: dict) -> dict:
        if body["model"] in self.adapters:
            from peft import set_peft_model_state_dict

            tensors, scale = self.adapters[body["model"]]
            set_peft_model_state_dict(self.model, tensors)
            for module in self.model.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling["default"] = scale
        ids, new, logprobs = list(body["prompt"]), [], []
        generator = torch.Generator().manual_seed(body["seed"])
        while len(new) < body["max_tokens"]:
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                chances = (logits / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            logprobs.append(float(logits.log_softmax(-1)[token]))  # raw: of temperature 1
            new.append(token)
            ids.append(token)
            if token in body["stop_token_ids"]:
                break
        choice = {
            "text": "never to be read",
            "token_ids": new,
            "prompt_token_ids": list(body["prompt"]),
            "logprobs": {"token_logprobs": logprobs, "tokens": [f"token_id:{i}" for i in new]},
        }
        return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}
