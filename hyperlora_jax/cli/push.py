"""`hyperlora push`: a folder of LoRAs, a hypernetwork or a base → a model repository of the hub.

Without `--upload` it only says what would go where.
"""

import argparse
import re
import sys
from pathlib import Path

from hyperlora_jax.errors import UserError

# What such folders hold for others. Pictures stay at home: they may show people.
SUFFIXES = (
    *(".safetensors", ".json", ".md", ".txt", ".py", ".onnx", ".onnx_data", ".pt2", ".data"),
    *(".model", ".jinja"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folder and repository."""
    parser.add_argument("out", metavar="OUT", help="folder of `export` or `generate --subjects`")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    parser.add_argument("--upload", action="store_true", help="do it; default: say what would go")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Upload by hyperlora push", help="of the commit")


def needs_jax(args: argparse.Namespace) -> bool:
    """Never."""
    return False


def run(args: argparse.Namespace) -> int:
    """Says what goes, and uploads it."""
    from hyperlora_jax import model_card

    folder = Path(args.out)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UserError(f"REPO {args.repo}: expected OWNER/NAME")
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {reason}, expected a folder")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    goes = [path for path in files if _goes(path.relative_to(folder))]
    if not any(path.suffix in (".safetensors", ".onnx", ".pt2") for path in goes):
        raise UserError(f"{folder}: holds no weights, expected a .safetensors file or a model")
    if not (folder / model_card.FILE).is_file():
        raise UserError(
            f"{folder}: has no {model_card.FILE}, expected the card that `hyperlora export` and "
            "`hyperlora generate --subjects` write"
        )
    for path in goes:
        print(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")
    if left := len(files) - len(goes):
        print(f"{left} other {'file stays' if left == 1 else 'files stay'} here")
    if not args.upload:
        print(f"dry run: {len(goes)} files would go to {args.repo}; --upload sends them")
        return 0
    print(f"wrote {_upload(folder, [path.relative_to(folder).as_posix() for path in goes], args)}")
    return 0


def _goes(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix in SUFFIXES


def _upload(folder: Path, names: list[str], args: argparse.Namespace) -> str:
    """Address of the commit."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = huggingface_hub.HfApi()
    print(f"uploading to {args.repo} …", file=sys.stderr)
    try:
        api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=args.repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=args.message,
        )
    except LocalTokenNotFoundError:
        raise UserError("the hub wants a login: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"{args.repo}: the hub says {str(error).splitlines()[0]}") from None
    except OSError as error:  # no network
        raise UserError(f"{args.repo}: the hub cannot be reached ({error})") from None
    return str(commit.commit_url)
