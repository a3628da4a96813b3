#!/usr/bin/env bash
# Trains word vectors on the documentation of the Python installation and shows what they have learnt.
#
# One rank per GPU, or two CPU ranks where there is none; NPROC=n changes that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

scripts/setup_env.sh

run=runs/quickstart
text=runs/python-docs.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ranks=${NPROC:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}

if [[ ! -f $text ]]; then
    echo "==> writing the documentation of the Python installation into $text"
    .venv/bin/python scripts/python_docs.py "$text"
fi

echo "==> training on $ranks ranks"
.venv/bin/torchrun --standalone --nproc-per-node "$ranks" -m embedtrain \
    train configs/quickstart.yaml data.path="$text" run.path="$run"

echo "==> quality: how far the vectors agree with a person on pairs of words from that documentation"
.venv/bin/embedtrain evaluate "$run" --similarity configs/quickstart-pairs.tsv

echo "==> nearest neighbours"
for word in list thread exception file matrix gradient; do
    .venv/bin/embedtrain neighbors "$run" "$word" --top 8
done

echo "==> the run's files are in $PWD/$run; open this page in a browser:"
.venv/bin/embedtrain report "$run"
