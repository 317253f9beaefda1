#!/bin/sh
# Installs what `data.style = fonts` needs: the fonts of Debian's package fonts-aenigma (by Brian Kent,
# who allows copies and changes under his name), without root, on Debian and its kin:
#
#     tools/install_fonts.sh [FOLDER]
#
# FOLDER is ~/.cache/hyperlora_jax/fonts unless given; then name it in HYPERLORA_FONTS. Elsewhere any
# folder of .ttf and .otf files will do.
set -eu
[ $# -le 1 ] || { echo "usage: $0 [FOLDER]" >&2; exit 2; }
folder=${1:-${HYPERLORA_CACHE:-$HOME/.cache/hyperlora_jax}/fonts}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -q fonts-aenigma
dpkg-deb -x fonts-aenigma_*.deb .
cp -r usr/share/fonts/truetype/. "$folder"
cp usr/share/doc/fonts-aenigma/copyright "$folder/copyright"
echo "$folder: $(find "$folder" -name '*.ttf' | wc -l) fonts"
