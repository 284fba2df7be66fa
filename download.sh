#!/usr/bin/env bash
# Fetch the published checkpoints and data; see usage() or: bash download.sh --help
set -u
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

usage() {
  cat <<'EOF'
usage: bash download.sh [--list | --help | NAME...]

Fetches models and data into data/. Without a NAME: celeba256_250000.pt, places256_300000.pt,
data.zip (the face example and the masks), 256x256_diffusion.pt and 256x256_classifier.pt.

  NAME    one or more files of the list, with or without .pt or .zip
  --list  every published file: its size where known, its licence, and what is already here

A transfer that broke off goes on where it stopped when the same command is given again. What is
complete is left alone. Each file is checked before it gets its name. Python is needed; gdown
(pip install gdown) for files on Google Drive; curl or wget for the others.

environment:
  REPAINT_MIRROR   an http(s) address or a folder with the files, asked before their own source
  REPAINT_TIMEOUT  seconds without data after which a transfer counts as stalled (60)
  REPAINT_TRIES    fruitless tries in a row after which a file is given up (5)

exit status: 0 all is here, 1 something is missing, 2 the command is wrong
EOF
}

# file | source | address | network | its configuration | licence | size
# "see source": the code's licence is known, the terms of the weights or pictures are not.
catalogue() {
  local openai=https://openaipublic.blob.core.windows.net/diffusion/jul-2021
  local code='MIT (code); weights: see source' repaint='CC BY-NC-SA 4.0'
  cat <<EOF
celeba256_250000.pt|drive|1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX|model|test_c256_thick|$repaint|2.2 GB
places256_300000.pt|drive|1QEl-btGbzQz6IwkXiFGd49uQNTUtTHsk|model|test_p256_thick|$repaint|2.2 GB
data.zip|drive|1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv|data||$repaint; pictures: see source|-
256x256_diffusion.pt|http|$openai|model|test_inet256_thick|$code|-
256x256_classifier.pt|http|$openai|classifier|test_inet256_thick|$code|-
256x256_diffusion_uncond.pt|http|$openai|model|inet256_uncond|$code|-
lsun_bedroom.pt|http|$openai|model|lsun_bedroom|$code|-
lsun_cat.pt|http|$openai|model|lsun_cat|$code|-
lsun_horse.pt|http|$openai|model|lsun_horse|$code|-
lsun_horse_nodropout.pt|http|$openai|model|lsun_horse_nodropout|$code|-
512x512_diffusion.pt|http|$openai|model|inet512|$code|-
512x512_classifier.pt|http|$openai|classifier|inet512|$code|-
64x64_diffusion.pt|http|$openai|model|inet64|$code|-
64x64_classifier.pt|http|$openai|classifier|inet64|$code|-
128x128_diffusion.pt|http|$openai|model|inet128|$code|-
128x128_classifier.pt|http|$openai|classifier|inet128|$code|-
EOF
}
published='celeba256_250000.pt places256_300000.pt data.zip 256x256_diffusion.pt 256x256_classifier.pt'

# The part that shell cannot do well: look into files, and put them in place all at once.
# Exit status 3: the file is at fault and of no use. Any other failure says nothing about the file.
IFS= read -r -d '' file_tool <<'EOF'
import glob, json, os, posixpath, shutil, stat, sys, zipfile


def refuse(reason):
    print(reason, file=sys.stderr)
    sys.exit(3)


def check_archive(path, every_byte):
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        refuse("is empty")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        refuse("is a web page and not the file")
    if head.startswith(b"version https://git-lfs"):
        refuse("is a Git LFS pointer and not the file")
    if path.startswith("data/pretrained/") and head.startswith(b"\x80\x02"):
        return  # torch's format before 1.6: one pickle, which only torch can check
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if every_byte else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        refuse(f"is cut off or damaged ({error})")
    if broken:
        refuse(f"is damaged (checksum of {broken})")


def check_keys(path, network, conf):
    try:
        import torch
    except ImportError:
        print("  torch is not installed: the file's table is checked, not its keys")
        return
    from guided_diffusion import script_util
    from guided_diffusion.config.keys import load_conf
    from guided_diffusion.errors import UserError
    from guided_diffusion.io.checkpoints import state_dict_shapes

    create = {"model": script_util.create_model, "classifier": script_util.create_classifier}
    with torch.device("meta"):
        built = create[network](load_conf(f"confs/{conf}.yml"))
    expected = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    try:
        found = {key: tuple(shape) for key, shape in state_dict_shapes(path).items()}
    except UserError as error:
        refuse(f"cannot be read: {error}")
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        refuse(
            f"is another network: {len(wrong)} keys differ, such as {wrong[0]} "
            f"(expected {expected.get(wrong[0])}, found {found.get(wrong[0])})"
        )


def put_in_place(path, final):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(path, final)


def safe_name(entry):
    name = entry.filename
    if (
        name.startswith("/") or "\\" in name or name[1:2] == ":" or ".." in name.split("/")
        or stat.S_ISLNK(entry.external_attr >> 16)
    ):
        refuse(f"holds an unsafe entry, {name!r}: nothing is unpacked")
    return posixpath.normpath(name[len("data/"):] if name.startswith("data/") else name)


def unpack(path, record):
    for left_over in glob.glob("data/datasets/.unpack-*"):
        shutil.rmtree(left_over)
    folder = f"data/datasets/.unpack-{os.getpid()}"
    with zipfile.ZipFile(path) as archive:
        entries = {
            safe_name(entry): entry for entry in archive.infolist()
            if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")
        }
        if not entries:
            refuse("is an archive without files")
        size = sum(entry.file_size for entry in entries.values())
        if size > shutil.disk_usage("data").free:
            sys.exit(f"unpacked it takes {size / 1e9:.1f} GB, and the disk has less")
        try:
            for name, entry in entries.items():
                target = os.path.join(folder, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with archive.open(entry) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
            for name in entries:
                os.makedirs(os.path.dirname(f"data/{name}"), exist_ok=True)
                os.replace(os.path.join(folder, name), f"data/{name}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with open(f"{record}.new", "w") as file:
        json.dump({name: entry.file_size for name, entry in entries.items()}, file, indent=0)
    put_in_place(f"{record}.new", record)
    print(f"  {len(entries)} files unpacked into data/")


def check_unpacked(record):
    with open(record) as file:
        sizes = json.load(file)
    for name, size in sizes.items():
        path = f"data/{name}"
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            refuse(f"data/{name} is gone or changed")


job, path, *rest = sys.argv[1:]
if job == "check":
    check_archive(path, every_byte=False)
    check_keys(path, *rest)
elif job == "finish":
    check_archive(path, every_byte=True)
    check_keys(path, *rest[1:])
    put_in_place(path, rest[0])
elif job == "unpack":
    check_archive(path, every_byte=True)
    unpack(path, rest[0])
else:
    check_unpacked(path)
EOF

say() { printf '%s\n' "$*"; }
complain() { printf '%s\n' "$*" >&2; }
die() {
  complain "error: $*"
  exit 2
}

# In the background, so that a signal to this script is answered at once and not after the child.
child=''
run() {
  "$@" &
  child=$!
  wait "$child"
  local status=$?
  child=''
  return $status
}
stop() {
  trap - INT TERM HUP
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null
    wait "$child" 2>/dev/null
  fi
  complain 'interrupted: what has arrived is kept, and the same command goes on from there'
  exit 130
}

bytes_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
human() {
  awk -v n="$1" 'BEGIN { if (n >= 1e9) printf "%.1f GB", n / 1e9
    else if (n >= 1e6) printf "%.1f MB", n / 1e6; else printf "%.1f kB", n / 1e3 }'
}

# Fill file, source, address, network, conf, licence, size, final and part for a name.
look_up() {
  while IFS='|' read -r file source address network conf licence size; do
    if [ "$1" = "$file" ] || [ "$1" = "${file%.*}" ]; then
      final=data/pretrained/$file
      # What data.zip unpacks to is what counts; the archive itself is removed afterwards.
      if [ "$file" = data.zip ]; then final=data/datasets/$file; fi
      part=$final.part
      return 0
    fi
  done < <(catalogue)
  return 1
}

list_files() {
  local name format='%-28s %-7s %-17s %s\n'
  # shellcheck disable=SC2059 # the format is the constant above
  printf "$format" FILE SIZE HERE LICENCE
  while IFS='|' read -r name _; do
    look_up "$name"
    local here=- arrived
    if [ -e "$final.contents" ]; then
      here=unpacked
    elif [ -e "$final" ]; then
      here=$(human "$(bytes_of "$final")")
    else
      arrived=$(largest "$part" "$part".drive*)
      if [ "$arrived" -gt 0 ]; then here="partly: $(human "$arrived")"; fi
    fi
    # shellcheck disable=SC2059
    printf "$format" "$file" "$size" "$here" "$licence"
  done < <(catalogue)
}

# Size of the largest of some files, which need not exist.
largest() {
  local most=0 candidate bytes
  for candidate in "$@"; do
    bytes=$(bytes_of "$candidate")
    if [ "$bytes" -gt "$most" ]; then most=$bytes; fi
  done
  echo "$most"
}

has_room_for() { # bytes still to come
  local free
  free=$(df -Pk data | awk 'NR == 2 { print $4 }')
  case $free in '' | *[!0-9]*) return 0 ;; esac
  if [ $(($1 / 1024 + 16384)) -le "$free" ]; then return 0; fi
  complain "$file: needs $(human "$1") and $(human $((free * 1024))) are free on the disk of $PWD/data"
  return 1
}

# Content-Length of an address as its server tells it, or nothing.
announced_length() {
  if [ "$agent" = curl ]; then
    run curl --silent --location --head --max-time "$timeout" "$1" >"$work/head"
  else
    run wget --spider --server-response --tries=1 --timeout="$timeout" "$1" 2>"$work/head"
  fi
  length=$(awk '{ sub(/\r$/, "") } toupper($1) ~ /^HTTP\// { status = $2; length_ = "" }
    tolower($1) == "content-length:" { length_ = $2 }
    END { if (status == 200 && length_ ~ /^[0-9]+$/) print length_ }' "$work/head")
}

# One transfer from an address to $part, going on where it ends. Sets http_status (or 000).
transfer() {
  local status quiet
  if [ "$agent" = curl ]; then
    quiet=--silent
    if [ -t 2 ]; then quiet=--progress-bar; fi
    run curl --fail --location "$quiet" --connect-timeout "$timeout" --speed-limit 1 \
      --speed-time "$timeout" --continue-at - --output "$part" --write-out '%{http_code}' \
      "$1" >"$work/status"
    status=$?
    http_status=$(cat "$work/status")
    if [ $status = 33 ]; then rm -f "$part"; fi # the server cannot go on in mid-file
    if [ $status = 23 ]; then http_status='disk full'; fi
  else
    quiet=--no-verbose
    if [ -t 2 ]; then quiet=--show-progress; fi
    run wget --continue --tries=1 "$quiet" --timeout="$timeout" --output-document="$part" \
      --server-response --output-file="$work/status" "$1"
    status=$?
    http_status=$(sed -n 's/^ *HTTP\/[0-9.]* \([0-9]*\).*/\1/p' "$work/status" | tail -n 1)
    if [ $status = 3 ]; then http_status='disk full'; fi
  fi
  # Both programs take "nothing beyond this byte" for success; but ours may be longer than theirs.
  if [ "$http_status" = 416 ]; then
    rm -f "$part"
    status=1
  fi
  return $status
}

# Get $part from an http(s) address.
get_http() {
  local fruitless=0 most=0 bytes done_ answered=no
  if [ "$agent" = none ]; then
    complain "$file: neither curl nor wget is installed"
    return 1
  fi
  announced_length "$1"
  bytes=$(bytes_of "$part")
  if [ -n "$length" ] && ! has_room_for $((length > bytes ? length - bytes : 0)); then return 1; fi
  while true; do
    bytes=$(bytes_of "$part")
    if [ -n "$length" ] && [ "$bytes" -gt 0 ]; then
      if [ "$bytes" -eq "$length" ]; then return 0; fi
      if [ "$bytes" -gt "$length" ]; then rm -f "$part"; fi
    fi
    if [ "$bytes" -gt "$most" ]; then most=$bytes; fi
    done_=no
    if transfer "$1"; then done_=yes; fi
    bytes=$(bytes_of "$part")
    if [ "$bytes" = 0 ]; then rm -f "$part"; fi # wget makes its file before it asks
    if [ $done_ = yes ] && [ "$bytes" = "${length:-$bytes}" ]; then return 0; fi
    case $http_status in
      408 | 416 | 425 | 429) ;;
      4?? | 'disk full')
        complain "$file: $1: ${http_status/#4/HTTP 4}"
        return 1
        ;;
    esac
    # Bytes that were never here before are worth another try; so a bad line gets through at last.
    fruitless=$((bytes > most ? 0 : fruitless + 1))
    # A server that has answered once is worth waiting for; without a network two tries will do.
    case $http_status in '' | 000) ;; *) answered=yes ;; esac
    if [ $fruitless -ge "$tries" ] || { [ $answered = no ] && [ $fruitless -ge 2 ]; }; then
      case $http_status in
        '' | 000) http_status='no connection' ;;
        2??) http_status='the line breaks off or stalls' ;;
        *) http_status="HTTP $http_status" ;;
      esac
      complain "$file: $1: given up after $fruitless tries ($http_status), $(human "$bytes") kept"
      return 1
    fi
    run sleep "$(awk -v n=$fruitless -v t="$timeout" 'BEGIN { print (n > 1 ? n : 1) * t / 12 }')"
  done
}

by_hand() {
  complain "  by hand: open https://drive.google.com/file/d/$address/view in a browser, save the file" \
    "as $PWD/$final and give the same command again: the file is then checked"
}
quota_page() {
  complain "$file: Google Drive sent a page in place of the file; usually its daily limit for this" \
    "file is used up (quota): try again in a day, or set REPAINT_MIRROR"
}

# Get $part from Google Drive. gdown has a stall limit in its newest versions only: watch it.
get_drive() {
  local at_most still=0 before=0 now status partial
  if ! command -v gdown >/dev/null; then
    complain "$file: is on Google Drive, and gdown is not installed (pip install gdown)"
    return 1
  fi
  case $size in
    *GB)
      at_most=$(awk -v gb="${size% GB}" 'BEGIN { printf "%.0f", gb * 1e9 }')
      before=$(largest "$part".drive*)
      if ! has_room_for $((at_most > before ? at_most - before : 0)); then return 1; fi
      ;;
  esac
  # gdown appends to our name for its partial files, will not choose between two, and takes a file
  # of the very name for complete.
  rm -f "$part.drive"
  for partial in "$part".drive*; do
    if [ "$(bytes_of "$partial")" -lt "$(largest "$part".drive*)" ]; then rm -f "$partial"; fi
  done
  if [ -t 2 ]; then
    gdown --continue -O "$part.drive" "$address" 2> >(tee "$work/gdown" >&2) &
  else
    gdown --continue -O "$part.drive" "$address" >"$work/gdown" 2>&1 &
  fi
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2
    now=$(largest "$part".drive*)
    still=$((now == before ? still + 1 : 0))
    before=$now
    if [ $still -ge $((timeout * 5)) ]; then
      complain "$file: Google Drive sent nothing for $timeout seconds"
      kill "$child" 2>/dev/null
      break
    fi
  done
  wait "$child"
  status=$?
  child=''
  if [ $status = 0 ] && [ -s "$part.drive" ]; then
    if [ "$(head -c 1 "$part.drive")" != '<' ]; then
      mv "$part.drive" "$part"
      return 0
    fi
    rm -f "$part.drive"
    quota_page
  elif grep -qiE 'too many users|quota|many accesses|retrieve (file url|the public link)' "$work/gdown"; then
    quota_page
  else
    complain "$file: gdown failed: $(tr -s '\r\n\t ' ' ' <"$work/gdown" | tail -c 300)"
  fi
  return 1
}

# Get $part from a folder.
get_folder() {
  if [ ! -f "$1" ]; then
    complain "$file: $1: no such file"
    return 1
  fi
  has_room_for "$(bytes_of "$1")" && run cp "$1" "$part"
}

# Check $part and give it its name. Status 3: it was of no use and is gone.
finish() {
  local status
  if [ "$file" = data.zip ]; then
    run "$python" -c "$file_tool" unpack "$part" "$final.contents" 2>"$work/reason"
  else
    run "$python" -c "$file_tool" finish "$part" "$final" "$network" "$conf" 2>"$work/reason"
  fi
  status=$?
  case $status in
    0) if [ "$file" = data.zip ]; then rm -f "$part"; fi ;;
    3)
      complain "$file: what came from $1 $(tail -n 1 "$work/reason")"
      rm -f "$part"
      ;;
    *) complain "$file: could not be checked: $(tail -n 1 "$work/reason")" ;;
  esac
  return $status
}

# Get the present file from one source: folder, http or drive, and where.
get_from() {
  local resumed status
  while true; do
    resumed=no
    if [ -s "$part" ]; then resumed=yes; fi
    "get_$1" "$2" || return 1
    finish "$2"
    status=$?
    # The earlier part may have come from elsewhere: then the whole file gets one more chance.
    if [ $status != 3 ] || [ $resumed = no ]; then return $status; fi
    say "$file: once more from the start"
  done
}

# Status 0 if the present file is here and whole. A broken one is moved out of the way.
is_here() {
  local status
  if [ "$file" = data.zip ] && [ -f "$final.contents" ]; then
    run "$python" -c "$file_tool" unpacked "$final.contents" 2>"$work/reason" && return 0
    say "$file: fetched again: $(tail -n 1 "$work/reason")"
  fi
  if [ ! -f "$final" ]; then return 1; fi
  if [ "$file" = data.zip ]; then
    run "$python" -c "$file_tool" unpack "$final" "$final.contents" 2>"$work/reason"
  else
    run "$python" -c "$file_tool" check "$final" "$network" "$conf" 2>"$work/reason"
  fi
  status=$?
  if [ $status = 0 ]; then return 0; fi
  if [ $status != 3 ]; then
    complain "$file: is here and could not be checked: $(tail -n 1 "$work/reason")"
    return 2
  fi
  complain "$file: $final $(tail -n 1 "$work/reason"); moved to $final.broken"
  mv "$final" "$final.broken"
  return 1
}

fetch() {
  look_up "$1"
  is_here
  case $? in
    0)
      say "$file: is here"
      return 0
      ;;
    2) return 1 ;;
  esac
  case $mirror in
    '') ;;
    http*) say "$file: from $mirror" && get_from http "$mirror/$file" && return 0 ;;
    *) say "$file: from $mirror" && get_from folder "$mirror/$file" && return 0 ;;
  esac
  if [ "$source" = http ]; then
    say "$file: from $address" && get_from http "$address/$file"
  else
    say "$file: from Google Drive" && get_from drive "$address" && return 0
    by_hand
    return 1
  fi
}

names=()
for word in "$@"; do
  case $word in
    --list | -l)
      list_files
      exit 0
      ;;
    --help | -h)
      usage
      exit 0
      ;;
  esac
  look_up "$word" || die "$word is not a published file; bash download.sh --list names them all"
  case " ${names[*]-} " in *" $file "*) ;; *) names+=("$file") ;; esac
done
# shellcheck disable=SC2206 # the published names hold no spaces
if [ ${#names[@]} = 0 ]; then names=($published); fi

timeout=${REPAINT_TIMEOUT:-60}
tries=${REPAINT_TRIES:-5}
case $timeout in '' | *[!0-9]* | 0) die "REPAINT_TIMEOUT: expected whole seconds, found $timeout" ;; esac
case $tries in '' | *[!0-9]* | 0) die "REPAINT_TRIES: expected a whole number, found $tries" ;; esac
mirror=${REPAINT_MIRROR:-}
mirror=${mirror#file://}
mirror=${mirror%/}
case $mirror in
  '' | http://* | https://* | /*) ;;
  *://*) die "REPAINT_MIRROR: expected an http(s) address or a folder, found $mirror" ;;
  *) mirror=$caller/$mirror ;;
esac
case $mirror in /*) [ -d "$mirror" ] || die "REPAINT_MIRROR: no such folder: $mirror" ;; esac
agent=none
for candidate in wget curl; do
  if command -v $candidate >/dev/null; then agent=$candidate; fi
done
python=''
for candidate in python python3; do # a virtual environment has both, and its own comes first
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || die 'Python 3.10 or newer is needed to check files, and is not installed'

mkdir -p data/pretrained data/datasets || die "cannot write to $PWD/data"
# A download that was killed may live on in its child; two writers would spoil the file.
exec 9<data/pretrained
if command -v flock >/dev/null && ! flock -n 9; then
  die "another download into $PWD/data is running"
fi
work=$(mktemp -d) || die 'no temporary folder can be made'
trap 'rm -rf "$work"' EXIT
trap stop INT TERM HUP

missing=()
for name in "${names[@]}"; do
  if fetch "$name"; then say "$name: ok"; else missing+=("$name"); fi
done
if [ ${#missing[@]} -gt 0 ]; then
  complain "missing: ${missing[*]} (the same command goes on with them)"
  exit 1
fi
say 'all is here'
