"""The verb `qwen-ray serve`: what it takes and what it does."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_OK
from qwen_ray.options import example, pairs, positive, set_option, verb
from qwen_ray.verbs import Output

# Options and the settings that they stand for (qwen_ray.serving.settings.ServeSettings).
_FLAGS = {
    "model": "model",
    "engine": "engine",
    "registry": "registry",
    "pin": "pinned",
    "router": "router",
    "knowledge": "knowledge",
    "embedder": "embedder",
    "keys": "keys",
    "replicas": "replicas",
    "gpus": "gpus_per_replica",
    "threads": "threads",
}


def add(verbs: Any) -> None:
    p = verb(verbs, "serve", serve, "serve a base model and its adapters, OpenAI-compatible, on Ray Serve")
    example(
        p,
        "qwen-ray serve --model tiny --registry runs/demo/registry --port 8000",
        "qwen-ray serve --model 3b --registry registry --router router --knowledge knowledge --gpus 1",
        "qwen-ray serve --model 3b --host 0.0.0.0 --keys keys.json --set limits.in_flight=64",
    )
    p.add_argument("--config", metavar="FILE", help="settings (YAML), see docs/serving.md; options go first")
    p.add_argument("--model", help="base model: alias, hub id or folder")
    p.add_argument("--engine", choices=("auto", "torch", "vllm"), help="what computes (auto)")
    p.add_argument(
        "--registry", metavar="PLACE", help="adapters served as BASE:NAME[@VERSION]: a folder or URI"
    )
    p.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=FOLDER",
        help="serve a PEFT folder as BASE:NAME; may be repeated",
    )
    p.add_argument("--pin", action="append", metavar="NAME", help="adapter that is always in memory")
    p.add_argument("--router", metavar="FOLDER", help="trained router: answers BASE:auto")
    p.add_argument("--knowledge", metavar="FOLDER", help="knowledge bases: answers BASE+rag, BASE:NAME+rag")
    p.add_argument("--embedder", metavar="NAME", help="embedding model, also of /v1/embeddings")
    p.add_argument("--keys", metavar="FILE", help="API keys (see `qwen-ray keys create`)")
    p.add_argument(
        "--no-auth", action="store_true", help="listen beyond this machine without asking for a key"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    p.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    p.add_argument("--replicas", type=positive, help="engine replicas (1)")
    p.add_argument("--gpus", type=float, help="GPUs of a replica; 0 computes on the CPU (0)")
    p.add_argument("--threads", type=positive, help="CPU threads of a replica (1)")
    p.add_argument("--address", help="Ray cluster to join (default: one of its own)")
    set_option(p, "limits.requests_per_minute=60")


def serve(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray import cluster
    from qwen_ray.config import read_settings
    from qwen_ray.serving import launch
    from qwen_ray.serving.auth import check_exposure
    from qwen_ray.serving.settings import ServeSettings

    flags = {key: given for option, key in _FLAGS.items() if (given := getattr(args, option)) is not None}
    if args.adapter:
        flags["adapters"] = pairs(args.adapter, "--adapter")
    tree, _ = read_settings(Path(args.config) if args.config else None, flags=flags, sets=args.set)
    settings = ServeSettings.of(tree)
    check_exposure(args.host, settings.keys, args.no_auth)
    launch.free_port(args.host, args.port)  # before a cluster is started for nothing
    most = settings.autoscaling.max_replicas if settings.autoscaling else settings.replicas
    cluster.connect(args.address, num_cpus=most + 1)
    url = launch.start(**tree, host=args.host, port=args.port)
    output.result({"url": url, "pid": os.getpid()}, f"serving at {url}/v1 (Ctrl-C stops it)")
    try:
        signal.pause()
    except KeyboardInterrupt:
        output.note("stopping")
    finally:
        launch.stop()
    return EXIT_OK
