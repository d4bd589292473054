"""Labels where the truth is known: do scorers prefer true descriptions, and what are labels worth?

    make bench NAME=labels JSON=out.json
    python benchmarks/labels.py --steps 300 --conversations 600     # a smaller one

Autoencoders are trained on the practice assistant, at each of `--sites`.  A concept has a pure latent where
its best one by F1 stands out among all (familywise p of .05) and has .8 of its firings on the concept, on
conversations that chose nothing.  Each of these is looked for with `find`, by its words, by a pasted text and
by labels, and its true description, written beforehand from the world's word lists, is ranked among twenty
wrong ones: by the scorers with the lexical judge, which understands no language but looks for the words that
a description quotes, and by those without a judge.  Then the lexical explainer and a language model label the
same latents, and the labels' detection scores are compared.

The language model is the largest one at hand, with three million parameters and a context of 256 tokens,
behind a local OpenAI-compatible server that holds replies to the schema that they are asked for: the first
sentence that the model says is the label.  It shows that the way through an endpoint works, not what a
capable model could say.  The embedding scorer takes the mean of the same model's last layer where no model
of sentences is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import subjects
import torch
from numpy.typing import NDArray
from turns import Result

from training import machine, versions
from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.cli.planted_labels import show
from unbraid.features.embedding import open_embedder
from unbraid.features.labels.calls import Calls
from unbraid.features.labels.embedding import Embed
from unbraid.features.labels.endpoint import Endpoint, EndpointConfig
from unbraid.features.labels.llm import LLM
from unbraid.features.labels.prompts import LONGEST_LABEL
from unbraid.manifest.errors import UserError
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.practice.assistant import folder
from unbraid.practice.corpus import conversations
from unbraid.recipes.concepts import document
from unbraid.recipes.labels import LabelReport, practice_labels
from unbraid.sae.formats.detect import detect
from unbraid.stats.bootstrap import bootstrap_mean, rate
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

NEW_TOKENS = 40


@contextmanager
def served(lm: LanguageModel) -> Iterator[str]:
    """An OpenAI-compatible server of one model while open; what does not fit is cut off at the beginning."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = "\n".join(message["content"] for message in asked["messages"])
            room = (lm.context or 512) - NEW_TOKENS - 16
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][-room:]
            with lock:
                prompt = ({"role": "user", "content": lm.tokenizer.decode(ids)},)
                (reply,) = generate(lm, [prompt], max_new_tokens=NEW_TOKENS, temperature=0)
            message = {"role": "assistant", "content": held(reply.text, asked)}
            usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": len(reply.token_ids)}
            data = json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def held(text: str, asked: dict[str, Any]) -> str:
    """A reply as servers give it that hold a model to a schema; of one text the first sentence."""
    if "response_format" not in asked:
        return text
    fields = asked["response_format"]["json_schema"]["schema"]["properties"]
    sentence = text.strip().split("\n")[0].split(". ")[0][:LONGEST_LABEL]
    return json.dumps({name: sentence for name, kind in fields.items() if kind["type"] == "string"})


def embedder(lm: LanguageModel) -> tuple[Embed, str]:
    """A model of sentences where one is installed, else the mean of a language model's last layer."""
    try:
        model = open_embedder()
    except UserError:
        site = Site.parse(f"layers.{lm.n_layers - 1}.resid_post")
    else:
        return model.encode, model.id[:12]

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        found: list[NDArray[np.float32]] = []
        for text in texts:
            ids = torch.tensor([lm.tokenizer(text)["input_ids"][: lm.context]])
            found.append(read_sites(lm, ids, torch.ones_like(ids), [site])[site][0].float().mean(0).numpy())
        return np.stack(found)

    return embed, f"{lm.name}, mean of the last layer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sites", nargs="+", default=["layers.0.resid_post", "layers.1.resid_post"])
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sae", nargs="*", type=Path, default=[], help="autoencoders in place of new ones")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, reports = Result(), list[LabelReport]()
    lm = load_model(folder())
    small = subjects.real()
    embed = embedder(small)
    print(f"labels by {small.name}, embeddings by {embed[1]}")
    with tempfile.TemporaryDirectory() as place, served(small) as url:
        work = Path(place)
        for number, sae in enumerate(given.sae or trained(lm, given, work)):
            calls = Calls(work / f"calls {number}.sqlite")
            config = EndpointConfig(url, small.name, max_tokens=NEW_TOKENS, concurrency=1)
            llm = LLM(Endpoint(config, calls))
            index, count = work / f"index {number}", given.conversations
            loaded = detect(sae).load()
            report = practice_labels(
                loaded, lm, index, sae_id=f"{number}", count=count, llms=[llm], embed=embed
            )
            reports.append(report)
            show(report, sae)
            found.row(f"unread_replies_{number}", llm.unread.twice, "replies")
    measured(found, reports)
    if given.out is not None:
        work_done = {key: str(value) for key, value in vars(given).items()}
        record: dict[str, Any] = {
            "work": work_done,
            "machine": machine(),
            "versions": versions(sys.executable),
            "rows": found.rows,
            "ratios": found.ratios,
            "details": [report.as_dict() for report in reports],
        }
        given.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def trained(lm: LanguageModel, given: argparse.Namespace, work: Path) -> Iterator[Path]:
    """An autoencoder at each site, on conversations of the world's fit split."""
    documents = [document(c) for c in islice(conversations("fit", seed=1, advice_share=0.4), 800)]
    for name in given.sites:
        site = Site.parse(name)
        store = capture(lm, documents, CaptureConfig(sites=(site,), dtype="float32"), work / f"acts {name}")
        config = TrainConfig(architecture="topk", d_sae=given.width, k=given.k, steps=given.steps, threads=1)
        train(store, None, config, work / f"sae {name}")
        yield work / f"sae {name}"


def measured(found: Result, reports: list[LabelReport]) -> None:
    """The shares over the concepts of all autoencoders, and the explainers' scores over all latents."""
    for name in ("concepts", "standing_out", "pure"):
        found.row(name, sum(getattr(report, name) for report in reports), "concepts")
    for how in reports[0].ways:
        found.interval(f"found_by_{how}", rate([yes for r in reports for yes in r.ways[how].found.values()]))
        guessed = [share for r in reports if (share := r.ways[how].guessed) is not None]
        if guessed:
            found.row(f"guessed_by_{how}", float(np.mean(guessed)), "of unrelated concepts' latents")
    rankings = [ranking for report in reports for ranking in report.rankings]
    for name in rankings[0].above:
        found.interval(f"true_first_{name}", rate([r.above[name] == r.wrong[name] for r in rankings]))
        beaten = sum(r.above[name] for r in rankings)
        found.row(f"wrong_beaten_{name}", beaten / sum(r.wrong[name] for r in rankings), "of the wrong ones")
    for explainer in reports[0].labellers:
        values = [v for report in reports for v in report.labellers[explainer]["values"]]
        found.interval(
            f"label_detection_{explainer}", bootstrap_mean(values, range(len(values)), 0).within(0, 1)
        )


if __name__ == "__main__":
    main()
