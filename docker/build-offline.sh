#!/usr/bin/env bash
# Builds the images where there is no Docker engine and no image registry, only a Debian mirror and a Python package index;
# as root, with buildah and debootstrap. Elsewhere `docker build` does the same from the same Dockerfile.
#
#   docker/build-offline.sh base               a stand-in for the official Python image: Debian with its own Python 3.11
#   docker/build-offline.sh build cpu          one target of the Dockerfile, as concord:cpu; also gpu and training
#   docker/build-offline.sh try cpu ARGUMENT…  run the image in a chroot: read-only root file system, its user, no capabilities
#
# Machine-specific settings come from the environment:
#   PIP_CONFIG   pip.conf for the index or mirror to use      CA_BUNDLE  certificates that the mirror's TLS needs
#   WHEELS       folder of wheels, mounted at the same path   DEBIAN     mirror for debootstrap
#   MOUNTS       for try: folders to show, as words HOST:IMAGE, or HOST:IMAGE:rw where the image may write (as user 65532)
#   BUILDAH      buildah with options: 'buildah --storage-driver vfs' where overlay file systems cannot be mounted
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
CA_BUNDLE=${CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}
BUILDAH=${BUILDAH:-buildah}
export BUILDAH_ISOLATION=chroot

base() {
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3.11-venv,python3-distutils bookworm "$root" ${DEBIAN:+"$DEBIAN"}
    ln -s /usr/bin/python3.11 "$root/usr/local/bin/python"
    cp "$CA_BUNDLE" "$root/etc/ssl/certs/ca-certificates.crt"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/* "$root"/var/log/*
    container=$($BUILDAH from scratch)
    $BUILDAH copy --quiet "$container" "$root" /
    $BUILDAH config --env PATH=/usr/local/bin:/usr/bin:/bin --cmd python "$container"
    $BUILDAH commit --quiet --format docker --rm "$container" "$PYTHON_IMAGE"
}

build() {
    local target=$1
    $BUILDAH bud --pull-never --network host --format docker --file docker/Dockerfile --target "$target" --tag "concord:$target" \
        --ignorefile docker/Dockerfile.dockerignore \
        --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
        --build-arg REVISION="$(git rev-parse HEAD)" \
        ${PIP_CONFIG:+--secret "id=pip,src=$PIP_CONFIG"} ${WHEELS:+--volume "$WHEELS:$WHEELS:ro"} .
    $BUILDAH images --format '{{.Name}}:{{.Tag}} {{.Size}}' "concord:$target"
}

try() {
    local target=$1
    shift
    container=$($BUILDAH from --pull-never "concord:$target")
    root=$($BUILDAH mount "$container")
    trap '$BUILDAH rm "$container" >/dev/null' EXIT
    mapfile -t environment < <($BUILDAH inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep .)
    mapfile -t entry < <($BUILDAH inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$container" | grep .)
    [ $# -gt 0 ] || mapfile -t entry < <(printf '%s\n' "${entry[@]}"; $BUILDAH inspect --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' "$container" | grep .)
    folder=$($BUILDAH inspect --format '{{.OCIv1.Config.WorkingDir}}' "$container")
    environment+=($(env | grep '^CONCORD_' || true))
    # In a separate mount namespace: the mounts end with the program.
    unshare --mount --propagation private bash -euc '
        root=$1; shift
        mount --bind "$root" "$root"
        for folder in ${MOUNTS:-}; do
            IFS=: read -r there here mode <<<"$folder"
            mkdir -p "$root$here" && mount --bind -o "${mode:-ro}" "$there" "$root$here"
        done
        mount -t devtmpfs -o ro devtmpfs "$root/dev" 2>/dev/null || mount --rbind /dev "$root/dev"
        mount -t proc proc "$root/proc"
        mount -o remount,bind,ro "$root"
        exec chroot "$root" setpriv --reuid 65532 --regid 65532 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
            env --ignore-environment "$@"
    ' bash "$root" --chdir "${folder:-/}" "${environment[@]}" "${entry[@]}" "$@"
}

case ${1:-} in
    base | build | try) "$@" ;;
    *) sed -n '2,/^set/{/^#/p}' "$0" >&2 && exit 2 ;;
esac
