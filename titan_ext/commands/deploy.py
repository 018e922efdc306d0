"""``titan-ext deploy FILE.toml --to …``: writes what a cluster's scheduler needs to run the sites of a file."""

import argparse
from pathlib import Path

from titan_ext.commands.command import Command
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole

_DESCRIPTION = """\
Write what Slurm, Kubernetes or SkyPilot needs to run the sites of a file, and start nothing. Names, nodes, GPUs, ports
and secrets are the file's; secrets are referred to and never copied. Any setting can be overridden for all sites:
--training.steps 20, --nproc_per_node 8 …
"""

_EPILOG = """\
  titan-ext deploy FILE.toml --to slurm --lighthouse http://login1:29510 --out jobs
  titan-ext deploy FILE.toml --to kubernetes --image IMAGE --claim data:/data --out manifests
  titan-ext deploy FILE.toml --to skypilot --lighthouse http://10.0.0.5:29510 --place east=aws/us-east-1 --out tasks
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For which scheduler, and what the file does not say."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--to", required=True, choices=("slurm", "kubernetes", "skypilot"), help="the scheduler")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; made if it is missing")
    parser.add_argument("--name", metavar="NAME", help="of the run, in names of jobs; default: the file's")
    parser.add_argument("--lighthouse", metavar="URL", help="where the sites meet; Kubernetes can run one itself")
    parser.add_argument("--cpu", action="store_true", help="the nodes have no GPUs")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts of a site by its launchers (default %(default)s)",
    )
    parser.add_argument(
        "--grace-seconds", type=int, default=60, metavar="S", help="to save and leave in (default %(default)s)"
    )
    kubernetes = parser.add_argument_group("Kubernetes")
    kubernetes.add_argument("--image", metavar="IMAGE", help="container image, built from launch/Dockerfile")
    kubernetes.add_argument("--namespace", default="default", metavar="NAME", help="default %(default)s")
    kubernetes.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="[SITE=]CLAIM:PATH",
        help="mount a persistent volume claim; can be repeated",
    )
    kubernetes.add_argument("--mesh", metavar="PEERS", help="join the WireGuard network of this file of launch/mesh.sh")
    skypilot = parser.add_argument_group("SkyPilot")
    skypilot.add_argument("--accelerator", metavar="NAME", help="such as H100; a node gets one for each of its ranks")
    skypilot.add_argument(
        "--place",
        action="append",
        default=[],
        metavar="SITE=CLOUD[/REGION]",
        help="where a site runs; default: AWS, Google Cloud or Azure, whichever has room",
    )


def run(args: argparse.Namespace) -> int:
    """Write the files, and say what to do with them; returns 0.

    Raises:
        UserError: the file has mistakes, or something that the scheduler needs is not given.
    """
    from titan_ext.config.load import load_run
    from titan_ext.deploy import kubernetes, skypilot, slurm
    from titan_ext.deploy.deployment import deployment

    flags = [f"--max-restarts={args.max_restarts}", f"--grace-seconds={args.grace_seconds}", *args.overrides]
    if args.max_restarts < 0 or args.grace_seconds < 1:
        raise UserError("--max-restarts must be at least 0, and --grace-seconds at least 1")
    found = deployment(
        load_run(args.file, args.overrides, needs=()).sites,
        file=args.file,
        name=args.name,
        lighthouse=_lighthouse(args.lighthouse),
        cpu=args.cpu,
        flags=flags,
        grace_seconds=args.grace_seconds,
    )
    notes: list[str] = []
    match args.to:
        case "slurm":
            files, steps = slurm.render(found), slurm.next_steps(found, args.out)
        case "kubernetes":
            options = kubernetes.read_options(found, args)
            files, steps = kubernetes.render(found, options), kubernetes.next_steps(found, options, args.out)
            notes = kubernetes.notes(found, options)
        case _:
            places = skypilot.read_places(found, args.place)
            files = skypilot.render(found, places, args.accelerator)
            steps = skypilot.next_steps(found, args.out)
    _write(Path(args.out), files)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {', '.join(sorted(files))} to {args.out}. Nothing runs yet; next:")
    print("\n".join(f"  {step}" for step in steps))
    return 0


def _lighthouse(url: str | None) -> str | None:
    from titan_ext.replica.address import lighthouse_url

    return None if url is None else lighthouse_url(url)


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise unwritable(f"--out {folder}", error) from None


COMMAND = Command(
    name="deploy",
    help="write what Slurm, Kubernetes or SkyPilot needs to run the sites of a file",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
