#!/usr/bin/env sh
# Fetches the libraries of the chat page again, at the versions below, and compares them with SHA256SUMS.
# Needs npm. For an update: change a version here and in README.md, run `./fetch.sh --update`, read the diff.
set -eu
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# take PACKAGE@VERSION FILE=NAME...: files of a package, copied to here under these names
take() {
    tarball=$(npm pack --silent --pack-destination "$folder" "$1")
    tar -xzf "$folder/$tarball" -C "$folder"
    shift
    for pair; do
        sed '/^\/\/# sourceMappingURL=/d' "$folder/package/${pair%%=*}" > "${pair#*=}"
    done
    rm -r "$folder/package"
}

take marked@18.2.1 lib/marked.esm.js=marked.js LICENSE=marked.LICENSE.txt
take dompurify@3.4.18 dist/purify.es.mjs=purify.js LICENSE=purify.LICENSE.txt
take @highlightjs/cdn-assets@11.12.0 es/highlight.min.js=highlight.js LICENSE=highlight.LICENSE.txt

if [ "${1:-}" = --update ]; then
    sha256sum ./*.js ./*.LICENSE.txt > SHA256SUMS
else
    sha256sum --check SHA256SUMS
fi
