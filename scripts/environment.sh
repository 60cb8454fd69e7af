# Sourced by the other scripts: creates the virtual environment with the package, and activates it.
#
#   source scripts/environment.sh EXTRA      "" for none
#
# PYTHON: its interpreter (default python3). VENV: its folder (default .venv in the checkout).
# When setup.py or constraints.txt change, the package is installed again.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_python=${PYTHON:-python3}
_venv=${VENV:-$_root/.venv}
_extra=$1

if ! "$_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  echo "Python 3.11 or 3.12 is needed; name one with PYTHON=/path/to/python" >&2
  exit 2
fi

_stamp=$(cat "$_root/setup.py" "$_root/constraints.txt" | cksum)
for _installed in "$_venv/.installed-$_extra" "$_venv/.installed-dev"; do
  # The extra `dev` contains the plain installation.
  if [ -f "$_installed" ] && [ "$(cat "$_installed")" = "$_stamp" ]; then _done=yes; fi
done
if [ "${_done:-}" != yes ]; then
  echo "installing into $_venv (once, about 2 GB)"
  [ -x "$_venv/bin/python" ] || "$_python" -m venv "$_venv"
  "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$_root/constraints.txt" --editable "$_root${_extra:+[$_extra]}"
  echo "$_stamp" > "$_venv/.installed-$_extra"
fi
export PATH="$_venv/bin:$PATH"
