#!/usr/bin/env bash
# Writes constraints.txt from the packages of the environment, without build tags, which other registries lack.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Every package that make env installs, as tested together on Python 3.11. Refresh it with scripts/freeze.sh."
  .venv/bin/pip freeze --exclude-editable | sed 's/+cpu$//'
} >constraints.txt
