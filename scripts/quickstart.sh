#!/usr/bin/env bash
# From nothing to a served model in a few minutes: installs, trains on the built-in digits,
# evaluates, exports and classifies pictures.
#
#   scripts/quickstart.sh [PICTURE ...]
#
# Pictures of yours are classified by a network that comes with the package: aeroplanes, cars, birds,
# cats, deer, dogs, frogs, horses, ships and trucks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh"
here=$PWD
cd "$root"
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)

echo "== train"
python -m keras_cifar.train --data digits --model resnet20 --epochs 12 \
  --learning_rate 3e-3 --lr_schedule onecycle --augment 'crop(3)' --run_dir "$run"

echo "== evaluate"
python -m keras_cifar.evaluate --run "$run"

echo "== predict"
python - "$run/pictures" <<'END'
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
python -m keras_cifar.predict --model "$run/export" "$run/pictures"
if (($#)); then
  echo "== your pictures"
  (cd "$here" && python -m keras_cifar.predict --model pretrained:fast "$@")
fi
echo
echo "all of it is in $root/$run; next, your own pictures:"
echo "  source ${VENV:-$root/.venv}/bin/activate"
echo "  python -m keras_cifar.train --data folder:PATH --image_size 64 --model resnet18"
