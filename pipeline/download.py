"""Checkpoints from the model hub, through huggingface_hub."""

from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.layout import CONFIG_FILE, MIMI_FILE, QUALITIES, TOKENIZER_FILE


def pull(repo: str, quality: str) -> Path:
    """Download what a run needs of `repo` into the hub's cache, going on where an earlier download ended.

    Returns its folder. Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = [CONFIG_FILE, QUALITIES[quality].file, MIMI_FILE, TOKENIZER_FILE]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=files))
    except HFValidationError:
        raise CheckpointError(f"model {repo!r}: expected a repository such as {QUALITIES[quality].repo}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(f"model {repo}: the hub cannot be reached: check the network, and try again") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"model {repo}: cannot be downloaded: {reason}") from None
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"model {repo}: has no {', '.join(missing)}; is it a {quality} checkpoint for MLX?")
    return folder
