#!/usr/bin/env bash
# From a folder of text to a trained GPT:   bash launch/quickstart.sh [FOLDER]
#
# Without FOLDER the text is the source code of Python's standard library, which is on this machine already.
# FOLDER may hold any UTF-8 text files, in any language. Nothing is downloaded but the packages.
# Stop it with Ctrl-C and run it again: it continues. Run it again when done: it shows the same run.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
folder=${1:-}
if [ -n "$folder" ]; then
    [ -d "$folder" ] || { echo "There is no folder $folder." >&2; exit 2; }
    folder=$(cd "$folder" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
prepare_python

hfscale() {  # show the command, quoted so that it can be copied, and run it
    local word line='    $ hfscale'
    for word in "$@"; do case $word in *[!A-Za-z0-9_./=,:-]*) line+=" '$word'" ;; *) line+=" $word" ;; esac; done
    printf '%s\n' "$line"
    "$PYTHON" -m launch.cli "$@"
}

# The corpus: a YAML for the two commands that read text, and a prompt in the language of the text
readarray -t made < <("$PYTHON" - "$folder" <<'PYTHON'
import json, re, sys, sysconfig
from pathlib import Path

folder, name, pattern, exclude, prompt, document_mb = sys.argv[1], "quickstart", "**/*", "", "def __init__(self", 4.0
if folder:
    name += "-" + re.sub(r"[^\w.-]+", "-", Path(folder).name)
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    # a few long files must give enough documents for some to be held out
    document_mb = min(4.0, max(0.004, sum(p.stat().st_size for p in files) / 200e6))
    for file in files:
        if start := re.search(r"[^\W\d_]{2,12}", file.read_bytes()[:4000].decode("utf-8", "ignore")):
            prompt = start[0]
            break
else:
    folder, pattern = sysconfig.get_path("stdlib"), "**/*.py,**/*.txt,**/*.rst"
    exclude = "site-packages/*,dist-packages/*,test/*,*/test/*,*/tests/*,*/idle_test/*"
corpus = Path("data", name)
corpus.mkdir(parents=True, exist_ok=True)
(corpus / "corpus.yaml").write_text(json.dumps({  # JSON is YAML
    "source": {"format": "text", "path": folder, "pattern": pattern, "exclude": exclude, "document_mb": round(document_mb, 3)},
    "split": {"validation": 0.05},
    "tokenizer": {"kind": "bpe", "vocab_size": 4096, "path": f"{corpus}/tokenizer"},
    "shards": {"path": f"{corpus}/shards", "shard_mb": 8, "chunk_mb": 1}}, indent=1), "utf-8")
print(name, corpus, prompt, sep="\n")
PYTHON
)
name=${made[0]} corpus=${made[1]} prompt=${made[2]} run=runs/${made[0]}

say "1/5 A tokenizer, trained on the text"
hfscale tokenizer train "$corpus/corpus.yaml"
say "2/5 The text as shards of tokens"
hfscale shards build "$corpus/corpus.yaml"
say "3/5 A small GPT (configs/pretrain/quickstart.yaml; Ctrl-C stops and saves, this script continues)"
hfscale pretrain configs/pretrain/quickstart.yaml "run.name=$name" "tokenizer.path=$corpus/tokenizer" \
    "data.sources.0.shards=$corpus/shards/train" "data.validation.shards=$corpus/shards/validation"
say "4/5 A folder that transformers loads"
if [ -e "$run/exports/model" ]; then echo "    $run/exports/model is there already"; else hfscale export "$run" "$run/exports/model"; fi
say "5/5 What it writes after: $prompt"
hfscale predict "$run/exports/model" --prompt "$prompt" generation.max_new_tokens=150 generation.do_sample=true generation.temperature=0.8

say "Done"
"$PYTHON" - "$run" "$corpus" <<'PYTHON'
import json, sys
from hfscale.shards.manifest import Manifest
from hfscale.shards.stats import unigram_entropy

run, corpus = sys.argv[1:]
records = [json.loads(line) for line in open(f"{run}/metrics.jsonl", encoding="utf-8")]
loss = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
unigram = unigram_entropy(*(Manifest.load(f"{corpus}/shards/{side}") for side in ("train", "validation")))
print(f"    validation loss {loss:.3f} nats a token; a model that only counts tokens gets {unigram:.3f} (the unigram entropy): {unigram - loss:.3f} nats better")
PYTHON
activate=
[ "$PYTHON" != "$PWD/.venv/bin/python" ] || activate="source .venv/bin/activate"
cat <<END

Next${activate:+, after  $activate}:
  tensorboard --logdir_spec $(basename $run):$run/tensorboard    # the curves
  hfscale pretrain $run train.steps=1000               # resume: train on from the last checkpoint
  hfscale predict $run --prompt "..." generation.max_new_tokens=99    # another text
  hfscale checkpoints $run --verify                    # what is saved, and whether it is whole
  hfscale show $run/config.yaml                        # every value of the config
  hfscale export $run my-model                         # the model as it is now, for transformers
END
