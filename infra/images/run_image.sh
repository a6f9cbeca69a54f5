#!/usr/bin/env bash
# run_image.sh IMAGE COMMAND…: run a command in an image that buildah built, as Kubernetes runs it under the restricted
# standard: the image's user and environment, no capability, a read-only root, /tmp alone to write to. No daemon is
# needed, but root. BUILDAH="buildah --root FOLDER" names another store, WITH=FOLDER is seen read-only as /tmp/with.
set -euo pipefail
image=${1:?usage: run_image.sh IMAGE COMMAND…}
shift
read -ra buildah <<< "${BUILDAH:-buildah}"
container=$("${buildah[@]}" from --pull-never "$image")
leave() {
    "${buildah[@]}" umount "$container" > /dev/null
    "${buildah[@]}" rm "$container" > /dev/null
}
trap leave EXIT
root=$("${buildah[@]}" mount "$container")
user=$("${buildah[@]}" inspect --type container --format '{{.OCIv1.Config.User}}' "$container")
mapfile -t environment < <("${buildah[@]}" inspect --type container --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | sed '/^$/d')
[[ $user == [1-9]*:* ]] || {
    echo "error: $image runs as user '$user'; the restricted standard wants a number above 0" >&2
    exit 1
}
# The namespaces and their mounts end with the command.
# shellcheck disable=SC2016 # the inner shell expands them
unshare --mount --pid --fork bash -c '
set -euo pipefail
root=$1 user=$2 with=$3
shift 3
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
if [ -n "$with" ]; then
    mkdir "$root/tmp/with"
    mount --bind "$with" "$root/tmp/with"
    mount -o remount,bind,ro "$root/tmp/with"
fi
exec chroot "$root" /usr/bin/env -i HOME=/tmp "$@"' \
    run_image "$root" "$user" "${WITH:-}" "${environment[@]}" \
    setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs --bounding-set -all "$@"
