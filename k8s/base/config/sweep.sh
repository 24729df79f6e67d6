#!/bin/bash
# Starts the sweep, or goes on with it: a job that is tried again finds the folder of before.
out=/storage/runs/sweep
resume=()
if [ -e "$out/sweep.json" ]; then resume=(--resume); fi
exec qwen-ray sweep /etc/qwen-ray/sweep.yaml --out "$out" --registry /storage/registry "${resume[@]}"
