#!/usr/bin/env bash
# Builds the documentation as a site, into build/site/VERSION. A warning is an error.
#
# Usage: scripts/docs.sh [OUTPUT]    OUTPUT replaces build/site
# The folders of other versions in OUTPUT stay: build each release into the same one, from a checkout of its tag. Each
# page then offers all of them, by OUTPUT/switcher.json. DOCS_URL is where OUTPUT is served from, / by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

scripts/setup_env.sh docs

output=${1:-build/site}
version=$(.venv/bin/python -c 'import embedtrain; print(embedtrain.__version__)')
.venv/bin/python -m jupytext --quiet --to ipynb docs/tutorial.md
rm -rf "${output:?}/$version"
.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --jobs auto --doctree-dir build/doctrees \
    docs "$output/$version"
.venv/bin/python scripts/versions.py "$output" "${DOCS_URL:-/}"
echo "==> $output/$version/index.html; for search and versions serve it: python -m http.server --directory $output"
