"""``titan-ext generate``: continue a text with a checkpoint."""

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING

from titan_ext.commands.command import Command
from titan_ext.errors import UserError
from titan_ext.inference.arguments import add_run_arguments, open_run

if TYPE_CHECKING:
    from titan_ext.config.load import Site
    from titan_ext.inference.checkpoint import Checkpoint
    from titan_ext.inference.decoding import Decoding

_DESCRIPTION = """\
Continue a text with a checkpoint, token by token, from a key-value cache. A model that iterates runs a chosen number
of iterations, or with --early-exit as many as each token needs. The text goes to stdout, what it took to stderr.
Settings can be overridden as in training: --model.skip input …
"""

_EXAMPLES = """\
examples:
  titan-ext generate FILE.toml --site east --prompt "def main"
  titan-ext generate FILE.toml --site east --prompt "def main" --iterations 4 --temperature 0
  titan-ext generate FILE.toml --site east --prompt "def main" --early-exit 0.05 --max-iterations 16
"""

_MAX_ITERATIONS = 8
"""The largest number that AbbIE's paper evaluates."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, what text, and how tokens are drawn."""
    add_run_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="of the body, for every token (default: model.eval_iterations)"
    )
    parser.add_argument(
        "--early-exit",
        type=float,
        metavar="TOL",
        help="iterate a token until the direction of its latent state changes by less than this, relative to its "
        "norm: 0 never stops early, 2 always after one iteration",
    )
    parser.add_argument(
        "--max-iterations", type=int, metavar="N", help=f"with --early-exit: at most (default {_MAX_ITERATIONS})"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="default %(default)s; 0 takes the most likely token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens that reach P together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole text again for every token")


def run(options: argparse.Namespace) -> int:
    """Print the prompt and its continuation as it comes, then what it took.

    Raises:
        UserError: an argument or the checkpoint cannot be used.
        RunError: the checkpoint cannot be read.
    """
    _check(options)
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer, vocabulary_size
    from titan_ext.inference.decoding import generate
    from titan_ext.inference.sampling import Sampler, TextStream

    site, checkpoint = open_run(options)
    tokenizer = build_tokenizer(site.tokenizer, site.vocabulary)
    prompt = tokenizer.encode(options.prompt, add_bos=True, add_eos=False)
    if not prompt:
        raise UserError("--prompt: must not be empty with a tokenizer that does not mark the beginning of a text")
    decoding = _decoding(options, site, checkpoint, len(prompt) + options.max_tokens)
    for note in site.notes:
        print(f"note: {note}", file=sys.stderr)
    sampler = Sampler(
        vocabulary_size(site.tokenizer, site.vocabulary),
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
    )
    stream = TextStream(tokenizer, prompt)
    started = time.perf_counter()
    print(options.prompt, end="", flush=True)
    for token in generate(decoding, prompt, sampler, options.max_tokens, tokenizer.eos_id):
        print(stream.push(token), end="", flush=True)
    print(stream.flush(), flush=True)
    seconds = time.perf_counter() - started
    counts = decoding.iterations_run
    print(
        f"{len(counts):,} tokens in {seconds:.2f} s with the prompt's {len(prompt):,} ({len(counts) / seconds:,.1f} "
        f"tokens/s), {sum(counts) / len(counts):.2f} iterations a token",
        file=sys.stderr,
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens}: must be at least 1")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature:g}: must be a number of at least 0")
    if options.top_k is not None and options.top_k < 1:
        raise UserError(f"--top-k {options.top_k}: must be at least 1")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p:g}: must be above 0 and at most 1")
    if options.early_exit is None:
        if options.max_iterations is not None:
            raise UserError(f"--max-iterations {options.max_iterations}: needs --early-exit")
        return
    if not options.early_exit >= 0:
        raise UserError(f"--early-exit {options.early_exit:g}: must be a number of at least 0")
    if options.iterations is not None:
        raise UserError(f"--iterations {options.iterations}: not with --early-exit, which takes --max-iterations")
    if options.no_cache:
        raise UserError("--no-cache: not with --early-exit, under which a token's keys depend on when it stopped")


def _decoding(options: argparse.Namespace, site: "Site", checkpoint: "Checkpoint", length: int) -> "Decoding":
    from titan_ext.inference.decoding import Cached, EarlyExit, Uncached
    from titan_ext.inference.model import default_iterations, load_model

    most = _MAX_ITERATIONS if options.max_iterations is None else options.max_iterations
    _check_model(options, site, most, length)
    model = load_model(site, checkpoint, weights=options.weights, length=length)
    trained = site.config.training.seq_len
    if length > trained:
        print(f"note: up to {length:,} tokens, while training saw at most {trained:,} in a row", file=sys.stderr)
    if options.early_exit is not None:
        return EarlyExit(model, options.early_exit, most, length)
    iterations = options.iterations or default_iterations(site)
    return Uncached(model, iterations) if options.no_cache else Cached(model, iterations, length)


def _check_model(options: argparse.Namespace, site: "Site", most: int, length: int) -> None:
    """Refuse what the site's model cannot do."""
    from titan_ext.inference.model import check_iterations

    if options.iterations is not None:
        check_iterations(site, "--iterations", options.iterations, [options.iterations])
    if options.early_exit is not None:
        flag, value = ("--early-exit", options.early_exit) if most > 0 else ("--max-iterations", most)
        check_iterations(site, flag, value, [most])
    longest = site.config.model_spec.model.max_seq_len
    if length > longest:
        raise UserError(
            f"--max-tokens {options.max_tokens}: with the prompt {length:,} tokens, must be at most {longest:,}, the "
            "model's longest"
        )


COMMAND = Command(
    name="generate",
    help="continue a text with a checkpoint",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
