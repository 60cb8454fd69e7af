#!/usr/bin/env bash
# From a clone to a model in a few minutes: installs the package, trains on the built-in digits,
# evaluates, exports and classifies images.
#
#   scripts/quickstart.sh [IMAGE ...]
#
# A network that comes with the package classifies the IMAGEs as aeroplane, car, bird, cat, deer, dog,
# frog, horse, ship or truck. RUN_DIR: the run directory (default runs/quickstart-<time> in the clone).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh" ""  # no extra; without an argument bash would pass the images
run=${RUN_DIR:-$root/runs/quickstart-$(date +%Y%m%d-%H%M%S)}

echo "== train"
python -m keras_cifar.train --data digits --model resnet20 --epochs 12 \
  --learning_rate 3e-3 --lr_schedule onecycle --augment 'crop(3)' --run_dir "$run"

echo "== evaluate"
python -m keras_cifar.evaluate --run "$run"

echo "== predict"
python - "$run/images" <<'END'
import pathlib
import sys

from keras_cifar.core import environment

environment.import_tensorflow()
from PIL import Image

from keras_cifar import data

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
test = data.load("digits").test
for index in range(0, 50, 10):
    name = f"{index:03}-a-{test.labels[index]}.png"
    Image.fromarray(test.images[index]).save(folder / name)
END
python -m keras_cifar.predict --model "$run/export" "$run/images"
if (($#)); then
  echo "== your images"
  python -m keras_cifar.predict --model pretrained:fast "$@"
fi
echo
echo "everything is in $run; next, train on your own images:"
echo "  source ${VENV:-$root/.venv}/bin/activate"
echo "  python -m keras_cifar.train --data folder:PATH --image_size 64 --model resnet18"
