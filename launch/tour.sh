#!/usr/bin/env bash
# All that hfscale does, on small models and text that is on this machine:   bash launch/tour.sh
#
# Pretrains an encoder, a decoder and an encoder-decoder, fine-tunes six tasks from them, evaluates each beside a trivial baseline,
# and predicts. Nothing is downloaded but the packages. About 20 minutes on two cores; run it again and it continues.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
prepare_python
data=data/tour

hfscale() { printf '    $ hfscale %s\n' "$*"; "$PYTHON" -m launch.cli "$@"; }

say "Texts and labelled examples, made from docstrings and program messages"
[ -e "$data/translation/run.yaml" ] || "$PYTHON" -m benchmarks.tour data "$data"

for model in encoder decoder encoder-decoder; do
    say "Pretraining: $model"
    hfscale tokenizer train "$data/$model/corpus.yaml"
    hfscale shards build "$data/$model/corpus.yaml"
    [ ! -e "$data/$model/lesson.yaml" ] || hfscale shards build "$data/$model/lesson.yaml"
    if [ ! -e "$data/$model/tokenizer" ]; then  # the ids of text stay, so the shards stay good
        case $model in
        encoder-decoder) hfscale tokenizer add "$data/$model/plain" "$data/$model/tokenizer" "pad=<pad>" "mask=<mask>" ;;
        *) cp -r "$data/$model/plain" "$data/$model/tokenizer" ;;
        esac
    fi
    hfscale pretrain "$data/$model/run.yaml"
done
for task in topics sentiment ner qa summarization translation; do
    say "Fine-tuning: $task"
    hfscale finetune "$data/$task/run.yaml"
    hfscale evaluate "runs/tour-$task"
done
say "One-off predictions"
hfscale predict runs/tour-sentiment --text "The waiter was cheerful."
hfscale predict runs/tour-qa --question "What does fill return?" --context "Fill a paragraph of text. Returns a string with line breaks, or raises ValueError if the width is 0."
hfscale predict runs/tour-translation --text "No such file or directory"
say "Scores on examples whose files, templates and words were not trained on"
"$PYTHON" -m benchmarks.tour table "$data" || say "What is NOT beaten wants longer training than a tour has: raise train.steps in $data/*/run.yaml and run it again"
