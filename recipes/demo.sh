#!/usr/bin/env bash
# `make demo`: train on two ranks, show the result, and prove that its gradients are exact.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
OUTPUT=outputs/demo

num_gpus=$("$BIN/python" -c 'import torch; print(torch.cuda.device_count())')
case $num_gpus in
  0) ranks=2; where="2 CPU ranks" ;;
  1) ranks=1; where="1 GPU (a second one would be a second rank)" ;;
  *) ranks=2; where="2 GPUs" ;;
esac
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=$(( cores / ranks > 0 ? cores / ranks : 1 ))
export TOKENIZERS_PARALLELISM=false
[ "$num_gpus" -gt 0 ] || export DS_ACCELERATOR=cpu  # where DeepSpeed is installed, accelerate imports it, and it warns

# accelerate starts several processes only with --multi_gpu, on CPU too; port 0 picks a free port.
launch=("$BIN/accelerate" launch --num_processes "$ranks" --num_machines 1 --mixed_precision no
        --dynamo_backend no --main_process_port 0)
[ "$ranks" -gt 1 ] && launch+=(--multi_gpu)

echo "Fine-tuning a small Llama on the docstrings of Python's standard library, on $where"
"${launch[@]}" recipes/finetune.py configs/demo.yaml --output_dir "$OUTPUT"
echo
"${launch[@]}" recipes/accumulation_proof.py "$OUTPUT"
