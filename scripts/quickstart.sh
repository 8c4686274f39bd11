#!/usr/bin/env bash
# From nothing to a pre-trained and evaluated tiny ELIP model, on real pictures, on any machine with Python >= 3.10:
# sets up .venv, makes shards of OpenMoji pictures, trains, evaluates on held-out pictures, prints a table.
#
#   bash scripts/quickstart.sh
#   NPROC=2 bash scripts/quickstart.sh     # the same global batch, shared by two processes
#   FAMILY=albef bash scripts/quickstart.sh   # a tiny ALBEF with ELIP, whose fusion layers rank shortlists again
#   FAMILY=blip bash scripts/quickstart.sh    # a tiny BLIP with ELIP, which writes captions of the held-out pictures too
#   FAMILY=meter bash scripts/quickstart.sh   # a tiny METER with ELIP, which compares each picture with each caption
#   bash scripts/quickstart.sh --seed 1       # arguments go to training.main, for a run that is not finished
#
# What exists is used again: environment, shards, a finished run (an unfinished one is resumed). Variables:
#   FRESH=1    delete the run and train anew
#   NPROC      training processes (default 1)
#   FAMILY     clip, albef, blip or meter (default clip)
#   EPOCHS     instead of those in configs/quickstart.yaml, quickstart_albef.yaml, ...
#   RUN        name of the run's folder in logs/
#   DATA       folder of the shards (default data/openmoji-64; data/openmoji-scenes-32 of albef, -tones-64 of others)
#   VENV       virtual environment (default .venv)
set -euo pipefail

fail() {
    echo "quickstart: $*" >&2
    exit 2
}

FRESH="${FRESH:-0}"
NPROC="${NPROC:-1}"
EPOCHS="${EPOCHS:-}"
FAMILY="${FAMILY:-clip}"
case "$FAMILY" in
    clip) CONFIG=quickstart PICTURES=openmoji-64 MAKE=(make_emoji_shards.py --size 64) ;;
    albef) CONFIG=quickstart_albef PICTURES=openmoji-scenes-32 MAKE=(make_scene_shards.py --size 32) ;;
    blip | meter)
        CONFIG="quickstart_$FAMILY" PICTURES=openmoji-tones-64 MAKE=(make_emoji_shards.py --size 64 --skin-tones)
        ;;
    *) fail "FAMILY must be clip, albef, blip or meter, not '$FAMILY'." ;;
esac
RUN="${RUN:-$CONFIG$([ "$NPROC" = 1 ] || echo "-${NPROC}proc")${EPOCHS:+-${EPOCHS}epochs}}"
DATA="${DATA:-}"
case "$FRESH" in 0 | 1) ;; *) fail "FRESH must be 0 or 1, not '$FRESH'." ;; esac
case "$NPROC" in '' | 0* | *[!0-9]*) fail "NPROC must be a whole number of at least 1, not '$NPROC'." ;; esac
case "$EPOCHS" in 0* | *[!0-9]*) fail "EPOCHS must be a whole number of at least 1, not '$EPOCHS'." ;; esac
case "$RUN" in . | .. | */*) fail "RUN must be a plain folder name, not '$RUN'." ;; esac
case "$DATA" in '' | /*) ;; *) DATA="$PWD/$DATA" ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
DATA="${DATA:-$ROOT/data/$PICTURES}"
FOLDER="$ROOT/logs/$RUN"

echo "quickstart: 1/3 pictures"
"$PYTHON" "scripts/${MAKE[0]}" --out "$DATA" "${MAKE[@]:1}"

# All shards of a folder, in the trainer's notation.
shards() { printf '%s/{00000..%05d}.tar' "$1" $(($(find "$1" -name '*.tar' | wc -l) - 1)); }

# The last checkpoint of a run.
newest() { ls -t "$ROOT/logs/$1"/checkpoints/epoch_*.pt | head -n 1; }

VOCABULARY=""
if [ "$FAMILY" != clip ]; then # BERT's would have to be downloaded
    VOCABULARY="$DATA/vocabulary"
    [ -e "$VOCABULARY/tokenizer_config.json" ] ||
        "$PYTHON" scripts/make_vocabulary.py --out "$VOCABULARY" "$(shards "$DATA/train")"
fi

if [ "$FRESH" = 1 ]; then
    rm -rf "$FOLDER"
fi
if "$PYTHON" scripts/quickstart_report.py --is-finished "$FOLDER"; then
    model="$(sed -n 's/^model: *//p' "configs/$CONFIG.yaml")"
    grep -qx "model: $model" "$FOLDER/config.yaml" && grep -qx "epochs: ${EPOCHS:-.*}" "$FOLDER/config.yaml" ||
        fail "RUN=$RUN is a finished run of another FAMILY or EPOCHS: choose another RUN, or FRESH=1 to train anew."
    echo "quickstart: 2/3 training: reusing the finished run in $FOLDER (FRESH=1 trains anew)"
else
    echo "quickstart: 2/3 training and evaluation on held-out pictures (a few minutes on 2 cores)"
    # Threads that spin while they wait make everything crawl as soon as another program wants a core.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    command=("$PYTHON" -m training.main)
    if [ "$NPROC" -gt 1 ]; then
        # Threads of all processes together as many as there are cores.
        cores="$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')"
        threads=$((cores / NPROC))
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
        # Without the two dashes at the end, torchrun takes --logs for one of its own options.
        command=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m training.main --)
    fi
    # --resume latest starts from the beginning where there is no checkpoint yet.
    train() {
        "${command[@]}" --config "configs/$1.yaml" --name "$2" "${@:3}" \
            --train-data "$(shards "$DATA/train")" --val-data "$(shards "$DATA/val")" \
            --logs "$ROOT/logs" --resume latest
    }
    own=()
    case "$FAMILY" in clip | blip) own=(--zeroshot-data "$DATA/val") ;; esac
    if [ "$FAMILY" = meter ]; then # has no space of contrast, and begins with the image tower of a CLIP
        "$PYTHON" scripts/quickstart_report.py --is-finished "$ROOT/logs/quickstart_meter_clip" ||
            train quickstart_meter_clip quickstart_meter_clip
        own=(--start-image "$(newest quickstart_meter_clip)")
    fi
    train "$CONFIG" "$RUN" "${own[@]}" ${VOCABULARY:+--text-tokenizer "$VOCABULARY"} ${EPOCHS:+--epochs "$EPOCHS"} "$@"
fi

echo "quickstart: 3/3 result"
"$PYTHON" scripts/quickstart_report.py "$FOLDER"
if [ "$FAMILY" = blip ]; then
    score=""
    command -v java > /dev/null && "$PYTHON" -c "import pycocoevalcap" 2> /dev/null && score=--score
    "$PYTHON" -m training.caption --pretrained "$(newest "$RUN")" --image "$(shards "$DATA/val")" --prompt "" \
        --out "$FOLDER/captions.csv" --workers 1 $score
    "$PYTHON" scripts/show_captions.py "$FOLDER/captions.csv" "$(shards "$DATA/val")"
elif [ "$FAMILY" = meter ]; then
    "$PYTHON" -m training.retrieval --pretrained "$(newest "$RUN")" --data "$(shards "$DATA/val")" \
        --workers 1 --results "$FOLDER/results"
fi
