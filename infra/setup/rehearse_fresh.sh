#!/usr/bin/env bash
# Rehearses a fresh machine: a minimal Debian in a folder (Python, venv, make, certificates), a copy of the repository, a
# person who is not root and has none of this machine's settings; then `make pretrain` and the quick tests inside.
#
#   sudo make rehearse-fresh [SUITE=trixie] [FOLDER=build/fresh] [STEPS="copy setup pretrain test"] [MINUTES=60] \
#     [PACKAGES="g++"] [ARGS="training.steps=20"]
#
# STEPS leaves out or repeats some (without copy the earlier copy is kept, with its environment and data), MINUTES ends
# the tests and says how many ran, PACKAGES are Debian's to install beforehand.
# Needs root, debootstrap and about 12 GB. Of the outer machine only network facts go in, and only by these variables:
#   REHEARSAL_NETWORK   "NAME=VALUE ..." set for the person inside: proxies, an index (HTTPS_PROXY=..., PIP_INDEX_URL=...)
#   REHEARSAL_CA        a file of certificates to trust inside, for machines behind an inspecting proxy
#   REHEARSAL_MIRROR    Debian mirror for debootstrap (its own default otherwise)
# and the resolver's /etc/resolv.conf. Nothing of them is written into the repository.
set -euo pipefail
suite=${SUITE:-trixie}
folder=$(realpath -m "${FOLDER:-build/fresh}")
steps=${STEPS:-copy setup pretrain test}
report=$folder/report.txt
root=$folder/$suite
home=/home/person
fail() { echo "error: $*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "debootstrap and chroot need root: sudo make rehearse-fresh"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
mkdir -p "$folder"

# One line a phase, on the screen and in the report: seconds, and the size of the root folder after it.
phase() {
  local name=$1 began=$SECONDS code=0
  shift
  "$@" >"$folder/$name.log" 2>&1 || code=$?
  printf '%-12s %6d s  %8s  %s\n' "$name" $((SECONDS - began)) "$(du -sh "$root" 2>/dev/null | cut -f1)" \
    "$([ $code = 0 ] && echo ok || echo "FAILED ($code), see $folder/$name.log")" | tee -a "$report"
  return $code
}

bootstrap() {
  debootstrap --variant=minbase --include=python3,python3-venv,make,ca-certificates "$suite" "$root.part" ${REHEARSAL_MIRROR:+"$REHEARSAL_MIRROR"}
  mv "$root.part" "$root"
}

network() {
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  [ -z "${REHEARSAL_CA:-}" ] || cp -L "$REHEARSAL_CA" "$root/etc/ssl/certs/ca-certificates.crt"
}

packages() {
  chroot "$root" apt-get update
  # shellcheck disable=SC2086  # words
  DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install --yes --no-install-recommends $PACKAGES
}

copy_repository() {
  chroot "$root" useradd --create-home person 2>/dev/null || chroot "$root" id person
  rm -rf "${root:?}$home/loomvideo"
  mkdir -p "$root$home/loomvideo"
  # What git knows, as it lies here: no environment, data, runs or caches of this machine.
  git ls-files -z --cached --others --exclude-standard | tar --create --null --ignore-failed-read --files-from=- |
    tar --extract --no-same-owner --directory="$root$home/loomvideo"
  chroot "$root" chown -R person: "$home/loomvideo"
}

# A command as the person inside, in mount and process namespaces that end with it.
inside() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin unshare --mount --pid --fork --kill-child bash -c '
    set -e
    root=$1 home=$2 network=$3 command=$4
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/dev/shm"
    chmod 1777 "$root/dev/shm"
    # The network is words NAME=VALUE.
    exec chroot --userspec=person:person "$root" env -i HOME="$home" USER=person LANG=C.UTF-8 \
      PATH=/usr/bin:/bin $network sh -c "cd $home/loomvideo && $command"
  ' rehearsal "$root" "$home" "${REHEARSAL_NETWORK:-}" "$1"
}

{
  date --utc '+%F %H:%M UTC'
  echo "$suite, $(nproc) cores, $(awk '/MemTotal/ {printf "%.0f", $2 / 1048576}' /proc/meminfo) GiB, load $(cut -d' ' -f1-3 /proc/loadavg)"
} >>"$report"
[ -d "$root" ] || phase debootstrap bootstrap
network
[ -z "${PACKAGES:-}" ] || phase packages packages
for step in $steps; do
  case $step in
    copy) phase copy copy_repository ;;
    setup) phase setup inside "make setup" ;;
    pretrain) phase pretrain inside "make pretrain ARGS='${ARGS:-}'" ;;
    test)
      # pytest counts what ran when it is interrupted, as by a person's Ctrl-C.
      phase test inside "${MINUTES:+timeout --signal=INT --kill-after=120 ${MINUTES}m }make test-fast" || failed=1
      counts=$(grep -aE '^[0-9]+ (passed|failed).* in [0-9]' "$folder/test.log") || counts="no test was counted"
      echo "$counts" | tee -a "$report"
      [ -z "${failed:-}" ] || exit 1
      ;;
    *) fail "STEPS: $step is none of copy, setup, pretrain, test" ;;
  esac
done
tail -n 12 "$report"
