#!/usr/bin/env bash
# Serves a run or an export with TensorFlow Serving in Docker, with REST on the loopback interface only:
#
#   scripts/serve.sh RUN_or_EXPORT [NAME]
#
# PORT: the port (default 8501). IMAGE: the image of TensorFlow Serving, whose version must not be older
# than that of the TensorFlow that wrote the export. New versions of the export are served as they appear.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: scripts/serve.sh RUN_or_EXPORT [NAME]" >&2
  exit 2
fi
base=$1 name=${2:-model}
[ ! -d "$base/export" ] || base=$base/export
if ! compgen -G "$base/[0-9]*/saved_model.pb" > /dev/null; then
  echo "serve.sh: $base has no <version>/saved_model.pb" >&2
  exit 1
fi
base=$(cd "$base" && pwd)
exec docker run --rm --publish "127.0.0.1:${PORT:-8501}:8501" \
  --mount "type=bind,source=$base,target=/models/$name,readonly" \
  --env "MODEL_NAME=$name" \
  "${IMAGE:-tensorflow/serving:latest}" --enable_batching=true
