#!/usr/bin/env bash
# transformers' example scripts, exact and unmodified. Clone its repository at the tag of your version, then for one:
#   bash recipes/frameworks/transformers_examples.sh path/to/transformers/examples/pytorch
# On several ranks: hf-gradutils run accelerate launch --num_processes 8 "$examples/…" …
set -euo pipefail
examples=${1:?path to the folder examples/pytorch of transformers}
hf-gradutils run "$examples/text-classification/run_classification.py" \
  --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/imdb \
  --text_column_names text --label_column_name label --metric_name accuracy \
  --do_train --max_seq_length 256 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
  --learning_rate 2e-5 --num_train_epochs 1 --output_dir outputs/classification
