#!/usr/bin/env bash
# Install Chromium, which the tests of the server's page drive, where Debian's packages are at hand.
# Without it those tests are skipped.
set -euo pipefail
command -v chromium > /dev/null && exit
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no Chromium, and it cannot be installed here: the tests of the page are skipped" >&2
  exit
fi
{ apt-get update && apt-get install --yes --no-install-recommends chromium; } > /dev/null 2>&1 ||
  echo "Chromium could not be installed: the tests of the page are skipped" >&2
