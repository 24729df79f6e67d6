"""The verbs `qwen-ray registry ...`: what they take and what they do."""

from __future__ import annotations

import argparse
import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError, did_you_mean
from qwen_ray.options import example, group, reason_option, registry_option, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.registry import AdapterVersion, Registry


def add(verbs: Any) -> None:
    registry = group(verbs, "registry", "adapter versions, what is in production, and why")
    p = verb(registry, "list", listing, "names, versions and aliases")
    example(
        p,
        "qwen-ray registry list --registry runs/demo/registry",
        "qwen-ray registry list --registry s3://b/r",
    )
    registry_option(p)
    p = verb(registry, "add", publish, "publish a trained adapter as the next version of a name")
    example(p, "qwen-ray registry add biology runs/bio/adapter")
    p.add_argument("name", help="adapter name: lower-case letters, digits, dot, dash")
    p.add_argument("folder", help="PEFT folder with lineage.json, as a run leaves it")
    registry_option(p)
    p = verb(
        registry, "import", import_, "publish an adapter of TRL, LLaMA-Factory, axolotl, Unsloth or PEFT"
    )
    example(p, "qwen-ray registry import biology out/bio --base 3b-instruct --from trl")
    p.add_argument("name", help="adapter name")
    p.add_argument("folder", help="the folder it was saved in")
    p.add_argument(
        "--base", required=True, help="model it was trained on: alias, hub id or folder; not in 4 bits"
    )
    p.add_argument("--from", dest="tool", help="what saved it (default: found out)")
    registry_option(p)
    p = verb(registry, "export", export, "write a version as a PEFT folder or as a whole model")
    example(p, "qwen-ray registry export biology@2 --to out/biology --format merged")
    p.add_argument("ref", help="NAME, NAME@VERSION or NAME@ALIAS")
    p.add_argument("--to", required=True, metavar="FOLDER", help="folder to write; must not exist")
    p.add_argument("--format", default="peft", help="peft or merged (%(default)s)")
    p.add_argument("--base", help="merged: the base, if it is not where the lineage says")
    registry_option(p)
    p = verb(
        registry, "show", show, "a name's versions, or one version's lineage and all that happened to it"
    )
    example(p, "qwen-ray registry show biology", "qwen-ray registry show biology@2")
    p.add_argument("ref", help="NAME, NAME@VERSION or NAME@ALIAS")
    registry_option(p)
    p = verb(registry, "card", card, "a version's model card: Markdown with the hub's front matter")
    example(
        p,
        "qwen-ray registry card biology > README.md",
        "qwen-ray registry card biology@2 --license apache-2.0 --out out/biology/README.md",
    )
    p.add_argument("ref", help="NAME, NAME@VERSION or NAME@ALIAS")
    p.add_argument("--license", metavar="ID", help="under which the adapter is given away (none chosen)")
    p.add_argument("--out", metavar="FILE", help="Markdown file to write (default: print it)")
    registry_option(p)
    p = verb(registry, "log", log, "all that happened to a name's versions, oldest first")
    example(p, "qwen-ray registry log biology --kind verdict")
    p.add_argument("name", help="adapter name")
    p.add_argument("--kind", help="events of this kind only, such as alias or verdict")
    registry_option(p)
    _add_decisions(registry)


def _add_decisions(registry: Any) -> None:
    p = verb(registry, "promote", promote, "point `production` at a version; exit 3 where its gate said no")
    example(
        p,
        "qwen-ray registry promote biology@2 --reason 'verdict of runs/comparison.json'",
        "qwen-ray registry promote biology@candidate --override --reason 'law checked by hand'",
    )
    _decision(p, "NAME@VERSION or NAME@ALIAS")
    p.add_argument(
        "--override", action="store_true", help="whatever the gate said; kept with reason and name"
    )
    p = verb(registry, "rollback", rollback, "point an alias at what it meant before")
    example(p, "qwen-ray registry rollback biology --reason 'wrong dates'")
    _decision(p, "adapter name")
    p.add_argument("--alias", default="production", help="(%(default)s)")
    p = verb(registry, "archive", archive, "put a version away: servers do not list it")
    example(p, "qwen-ray registry archive biology@1 --reason 'replaced by 2'")
    _decision(p, "NAME@VERSION")
    p = verb(registry, "restore", restore, "take a version out of the archive")
    example(p, "qwen-ray registry restore biology@1 --reason 'to compare'")
    _decision(p, "NAME@VERSION")
    p = verb(registry, "gc", collect, "remove the files of archived versions that nothing needs any more")
    example(p, "qwen-ray registry gc --dry-run", "qwen-ray registry gc --archived-days 180")
    p.add_argument("--dry-run", action="store_true", help="say what would go, and keep it")
    p.add_argument(
        "--archived-days", type=float, help="for so long the files of an archived version stay (90)"
    )
    p.add_argument("--rollbacks", type=int, help="of what each alias meant before, so many stay (2)")
    registry_option(p)


def _decision(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("ref", metavar="name" if what == "adapter name" else "ref", help=what)
    reason_option(parser)
    parser.add_argument("--by", help="who decides (default: the user of this machine)")
    registry_option(parser)


def listing(args: argparse.Namespace, output: Output) -> int:
    registry = _registry(args)
    rows, lines = [], []
    for name in registry.names():
        versions, aliases = registry.versions(name), registry.aliases(name)
        rows.append({"name": name, "versions": versions, "aliases": aliases})
        archived = registry.archived(name)
        line = f"{name}: versions {', '.join(map(str, versions))}"
        line += f" (archived: {', '.join(map(str, archived))})" if archived else ""
        lines.append(line + "".join(f"; {alias} -> {version}" for alias, version in aliases.items()))
    output.result(rows, "\n".join(lines) or "no adapter registered")
    return EXIT_OK


def publish(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.fsio import read_json
    from qwen_ray.peft_folder import WEIGHTS
    from qwen_ray.registry import LINEAGE
    from qwen_ray.serving.lora_weights import check_finite

    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError("no such adapter folder", where=args.folder, fix="name the adapter/ folder of a run")
    if not (folder / LINEAGE).is_file():
        raise UserError(
            "this adapter has no lineage.json",
            where=args.folder,
            fix="of another tool: qwen-ray registry import",
        )
    if (folder / WEIGHTS).is_file():  # else it is refused as no adapter
        check_finite(folder)
    return _published(_registry(args).publish(args.name, folder, read_json(folder / LINEAGE)), args, output)


def import_(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry.importing import import_adapter, recognise

    folder = Path(args.folder)
    found = recognise(folder, args.tool)
    version = import_adapter(_registry(args), args.name, folder, base=args.base, tool=found.tool)
    output.note(f"saved by {found.tool} for '{found.base}'; {len(found.others)} other files are not taken")
    return _published(version, args, output)


def _published(version: AdapterVersion, args: argparse.Namespace, output: Output) -> int:
    value = {"ref": version.ref, "path": str(version.folder), "digest": version.digest}
    output.result(value, f"registered {version.ref} at {args.registry}")
    return EXIT_OK


def export(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry.exporting import export_adapter

    registry = _registry(args)
    version = _version(registry, args.ref)
    out = export_adapter(registry, version, Path(args.to), form=args.format, base=args.base)
    output.result({"ref": version.ref, "out": str(out)}, str(out))
    return EXIT_OK


def show(args: argparse.Namespace, output: Output) -> int:
    import json

    from qwen_ray.registry.text import overview, story

    registry = _registry(args)
    name, _, at = args.ref.partition("@")
    if not at:
        registry.check(name)
        state = registry.state(name).document()
        value = {
            "name": name,
            "versions": registry.versions(name),
            **{k: state[k] for k in state if k != "log"},
        }
        events = [asdict(event) for event in registry.events(name)]
        output.result({**value, "events": events}, "\n".join(overview(registry, name)))
        return EXIT_OK
    number = int(at) if at.isdecimal() else registry.resolve(name, at).version
    lineage = registry.lineage(name, number)
    events_of = registry.events(name, version=number)
    value = {"ref": f"{name}@{number}", "lineage": lineage, "events": [asdict(e) for e in events_of]}
    text = [f"{name}@{number}", *(f"  {line}" for line in story(events_of)), "lineage:"]
    output.result(value, "\n".join([*text, json.dumps(lineage, indent=2, ensure_ascii=False)]))
    return EXIT_OK


def card(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.fsio import output_path, write_text
    from qwen_ray.report.card import model_card

    out = None if args.out is None else output_path(args.out)
    registry = _registry(args)
    version = _version(registry, args.ref)
    text = model_card(registry, version, license=args.license)
    if out is not None:
        write_text(out, text)
    shown = None if out is None else str(out)
    output.result({"ref": version.ref, "card": text, "out": shown}, shown or text.rstrip())
    return EXIT_OK


def log(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry.events import KINDS
    from qwen_ray.registry.text import story

    if args.kind not in (None, *KINDS):
        raise UserError(
            f"'{args.kind}' is no kind of event", where="--kind", fix=did_you_mean(args.kind, KINDS)
        )
    registry = _registry(args)
    registry.check(args.name)
    events = registry.events(args.name, kind=args.kind)
    output.result([asdict(event) for event in events], "\n".join(story(events)) or "nothing")
    return EXIT_OK


def promote(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry import PRODUCTION
    from qwen_ray.registry.records import promote_against
    from qwen_ray.serving.lora_weights import check_finite

    registry = _registry(args)
    if "@" not in args.ref:
        raise UserError(
            f"'{args.ref}' is not NAME@VERSION", fix="for example: qwen-ray registry promote biology@2"
        )
    version, by = _version(registry, args.ref), _by(args)
    check_finite(version.path)
    was = registry.aliases(version.name).get(PRODUCTION)
    verdicts = registry.events(version.name, version=version.version, kind="verdict")
    said = verdicts[-1].value if verdicts else None
    if args.override:
        verdict = None if said is None else str(said["verdict"])
        promote_against(registry, version, verdict=verdict, reason=args.reason, by=by, was=was)
    elif said is not None and said["verdict"] != "promote":
        reasons = "; ".join(said["reasons"])
        output.note(
            f"the gate said '{said['verdict']}' of {version.ref}: {reasons}\n  fix: --override, with a reason"
        )
        return EXIT_GATE_SAID_NO
    else:
        registry.point(version.name, PRODUCTION, version.version, reason=args.reason, by=by, was=was)
    value = {"name": version.name, PRODUCTION: version.version}
    output.result(value, f"{PRODUCTION} of {version.name} is version {version.version}")
    return EXIT_OK


def rollback(args: argparse.Namespace, output: Output) -> int:
    version = _registry(args).rollback(args.ref, reason=args.reason, alias=args.alias, by=_by(args))
    value = {"name": version.name, args.alias: version.version}
    output.result(value, f"{args.alias} of {version.name} is version {version.version} again")
    return EXIT_OK


def archive(args: argparse.Namespace, output: Output) -> int:
    name, version = _numbered(args.ref)
    _registry(args).archive(name, version, reason=args.reason, by=_by(args))
    output.result({"ref": args.ref, "archived": True}, f"{args.ref} is archived")
    return EXIT_OK


def restore(args: argparse.Namespace, output: Output) -> int:
    name, version = _numbered(args.ref)
    _registry(args).restore(name, version, reason=args.reason, by=_by(args))
    output.result({"ref": args.ref, "archived": False}, f"{args.ref} is out of the archive")
    return EXIT_OK


def collect(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.config import validate
    from qwen_ray.registry.collect import Retention

    given = {"archived_days": args.archived_days, "rollbacks": args.rollbacks}
    tree = {key: value for key, value in given.items() if value is not None}
    removals = _registry(args).collect(validate(Retention, tree, where="gc", origin={}), dry_run=args.dry_run)
    lines = [f"{removal.what}: {removal.size / 2**20:,.1f} MiB" for removal in removals]
    done = "would be removed" if args.dry_run else "removed"
    output.result(
        {"dry_run": args.dry_run, "removed": [asdict(removal) for removal in removals]},
        "\n".join([*lines, f"{done}: {len(removals)}"]),
    )
    return EXIT_OK


def _registry(args: argparse.Namespace) -> Registry:
    from qwen_ray.registry import Registry

    return Registry(args.registry)


def _version(registry: Registry, ref: str) -> AdapterVersion:
    name, _, at = ref.partition("@")
    return registry.resolve(name, at or None)


def _numbered(ref: str) -> tuple[str, int]:
    name, _, number = ref.partition("@")
    if not number.isdecimal():
        raise UserError(f"'{ref}' is not NAME@VERSION", fix="`qwen-ray registry list` shows the versions")
    return name, int(number)


def _by(args: argparse.Namespace) -> str:
    try:
        return str(args.by or getpass.getuser())
    except (KeyError, OSError):  # a container's user need not have a name
        return "unknown"
