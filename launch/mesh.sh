#!/usr/bin/env bash
# Puts this machine into a private WireGuard network of all sites; see --help.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    cat <<'END'
A private network between the sites of a run: everything in it is encrypted, and only holders of the
listed keys take part. Sites and lighthouse then use the addresses inside it.

  bash launch/mesh.sh up SITE --peers FILE      join, or take over what has changed in FILE (root)
  bash launch/mesh.sh status --peers FILE       which peers have been heard (root)
  bash launch/mesh.sh down                      leave (root)

FILE has one line a machine and is the same everywhere; it holds nothing secret:

  # site  public key  endpoint                 address inside
  east    -           east.example:51820       10.88.0.1
  west    -           west.example:51820       10.88.0.2
  north   -           -                        10.88.0.3

  public key      "-" until the site's first `up` has made the key and printed it
  endpoint        HOST:PORT on which the others reach the site over UDP, and on which it listens;
                  "-" behind NAT: the site then calls the others, which need endpoints of their own
  address inside  yours to choose, from a range that is in use at no site

Run `up` once at each site, put the keys that it prints into FILE, give all sites the file, and run it
again. The private key is made on the machine, readable by root alone, and never leaves it.

  --key FILE        the private key (default: /etc/wireguard/titan_ext.key)
  --interface NAME  name of the network interface (default: wg0)
  --mtu BYTES       largest packet (default: 1420; 80 less than that of the smallest link between sites)
  --dry-run         print what would be done; needs no root and changes nothing

Needs `wg` (Debian, Ubuntu: apt install wireguard-tools) and `ip` (iproute2). Where the kernel has no
WireGuard, wireguard-go is used if it is installed; it is slower.
END
}

interface=wg0
key_file=/etc/wireguard/titan_ext.key
mtu=1420
peers_file=""
dry_run=false
own_site=""

# The peers file, by line: names, keys, endpoints, addresses; `own` is the index of this site.
names=() keys=() endpoints=() addresses=() own=""

parse_arguments() {
    local option
    while (($#)); do
        option="$1"
        shift
        case "$option" in
            --dry-run) dry_run=true ;;
            --peers | --key | --interface | --mtu)
                (($#)) || fail "$option needs a value"
                case "$option" in
                    --peers) peers_file="$1" ;;
                    --key) key_file="$1" ;;
                    --interface) interface="$1" ;;
                    --mtu) mtu="$1" ;;
                esac
                shift
                ;;
            -*) fail "$option: no such option; --help lists them" ;;
            *)
                [[ -z "$own_site" ]] || fail "$option: only one site can be named, and that is $own_site"
                own_site="$option"
                ;;
        esac
    done
    [[ "$interface" =~ ^[A-Za-z0-9_.-]{1,15}$ ]] ||
        fail "--interface $interface: must be at most 15 letters, digits, '_', '.' or '-'"
    if [[ ! "$mtu" =~ ^[0-9]{3,5}$ ]] || ((10#$mtu < 576)); then
        fail "--mtu $mtu: must be a number of at least 576"
    fi
}

check_surroundings() {
    $dry_run && return
    ((EUID == 0)) || fail "this needs root: run it with sudo, or see what it would do with --dry-run"
    local tool
    for tool in wg ip; do
        command -v "$tool" >/dev/null ||
            fail "$tool is not installed (Debian, Ubuntu: apt install wireguard-tools iproute2)"
    done
}

is_port() { [[ "$1" =~ ^[0-9]{1,5}$ ]] && ((10#$1 >= 1 && 10#$1 <= 65535)); }

is_address() {
    local part
    if [[ "$1" =~ ^([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})$ ]]; then
        for part in "${BASH_REMATCH[@]:1}"; do
            ((10#$part <= 255)) || return 1
        done
    else
        [[ "$1" =~ ^[0-9a-fA-F:]*:[0-9a-fA-F:]*$ ]]
    fi
}

read_peers() {
    [[ -n "$peers_file" ]] || fail "--peers FILE is missing; --help shows such a file"
    [[ -r "$peers_file" ]] || fail "--peers $peers_file: no such file, or not readable"
    local line number=0
    while read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        line="${line%%[#$'\r']*}"
        [[ -z "${line//[[:space:]]/}" ]] || read_peer "$peers_file line $number" "$line"
    done <"$peers_file"
}

read_peer() {
    local where="$1" fields=() name key endpoint address index
    read -ra fields <<<"$2"
    ((${#fields[@]} == 4)) || fail "$where: must be SITE KEY ENDPOINT ADDRESS, and has ${#fields[@]} word(s)"
    name="${fields[0]}" key="${fields[1]}" endpoint="${fields[2]}" address="${fields[3]}"
    [[ "$key" == - || "$key" =~ ^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$ ]] ||
        fail "$where: $key is not a WireGuard public key (44 characters, the last \"=\") and not \"-\""
    [[ "$endpoint" == - ]] || { [[ "$endpoint" == ?*:* ]] && is_port "${endpoint##*:}"; } ||
        fail "$where: endpoint $endpoint must be HOST:PORT or \"-\""
    is_address "$address" || fail "$where: $address is not an IP address (without a prefix length)"
    for index in "${!names[@]}"; do
        [[ "${names[index]}" != "$name" ]] || fail "$where: site $name has a line already"
        [[ "${addresses[index]}" != "$address" ]] || fail "$where: $address is ${names[index]}'s already"
        [[ "$key" == - || "${keys[index]}" != "$key" ]] || fail "$where: this key is ${names[index]}'s already"
    done
    [[ "$name" != "$own_site" ]] || own="${#names[@]}"
    names+=("$name") keys+=("$key") endpoints+=("$endpoint") addresses+=("$address")
}

make_key() {
    [[ ! -e "$key_file" ]] || return 0
    if $dry_run; then
        echo "# a private key would be made in $key_file"
        return
    fi
    (
        umask 077
        mkdir -p "$(dirname "$key_file")"
        wg genkey >"$key_file"
    )
    echo "made this site's private key: $key_file"
}

public_key() {
    if [[ -r "$key_file" ]] && command -v wg >/dev/null; then
        wg pubkey <"$key_file"
    fi
}

check_own_key() {
    local key="$1"
    [[ "${keys[own]}" == - || -z "$key" || "${keys[own]}" == "$key" ]] ||
        fail "$peers_file gives $own_site the key ${keys[own]}, but the one in $key_file is $key: correct the line," \
            "unless it is another machine's"
}

# What `wg` is told, the private key as its first argument.
wireguard_configuration() {
    local index
    printf '[Interface]\nPrivateKey = %s\n' "$1"
    [[ "${endpoints[own]}" == - ]] || echo "ListenPort = ${endpoints[own]##*:}"
    for index in "${!names[@]}"; do
        [[ "$index" != "$own" && "${keys[index]}" != - ]] || continue
        printf '\n[Peer]\n# %s\nPublicKey = %s\n' "${names[index]}" "${keys[index]}"
        printf 'AllowedIPs = %s\n' "$(with_prefix "${addresses[index]}")"
        [[ "${endpoints[index]}" == - ]] || echo "Endpoint = ${endpoints[index]}"
        echo "PersistentKeepalive = 25" # keeps the way through NAT and firewalls open
    done
}

with_prefix() { if [[ "$1" == *:* ]]; then echo "$1/128"; else echo "$1/32"; fi; }

# `wg` and `ip`, and not `wg-quick`, which does the same steps for a network that is there at once. It refuses an
# interface that is up; to take over a changed peers file it would be brought down and up again, which interrupts a run
# that is training, or `wg syncconf` would be called beside it as below, and it sets no addresses and routes then. And
# its configuration file would be a second file to keep like the peers file, with the private key in it.
exists() { ip link show dev "$interface" >/dev/null 2>&1; }

# Another network may have taken the name, and its peers would be thrown out.
check_is_ours() {
    local key
    key="$(wg show "$interface" public-key 2>/dev/null)" || key="no WireGuard"
    [[ "$key" == "(none)" || "$key" == "$(public_key)" ]] ||
        fail "$interface is there already and is not this network's: choose another --interface"
}

add_interface() {
    if $dry_run; then
        echo "ip link add dev $interface type wireguard  # or, where the kernel has none: wireguard-go $interface"
    elif exists; then
        check_is_ours
    elif ! ip link add dev "$interface" type wireguard 2>/dev/null; then
        command -v wireguard-go >/dev/null ||
            fail "the kernel has no WireGuard, and wireguard-go is not installed (apt install wireguard-go)"
        wireguard-go "$interface" >/dev/null 2>&1 || fail "wireguard-go cannot make $interface"
    fi
}

configure() {
    if $dry_run; then
        echo "wg syncconf $interface /dev/stdin <<END"
        wireguard_configuration "(the content of $key_file)"
        echo "END"
    else
        # Not as a file: the private key would stay in it.
        wireguard_configuration "$(<"$key_file")" | wg syncconf "$interface" /dev/stdin ||
            fail "wg refuses these peers; its reason is above"
    fi
}

run() { if $dry_run; then echo "$*"; else "$@"; fi; }

up() {
    [[ -n "$own_site" ]] || fail "up needs the name of this site, as it stands in the peers file"
    read_peers
    [[ -n "$own" ]] ||
        fail "$peers_file has no line for $own_site: add one, such as \"$own_site - HOST:51820 10.88.0.9\""
    make_key
    local key index
    key="$(public_key)"
    check_own_key "$key"
    add_interface
    configure
    run ip address replace "$(with_prefix "${addresses[own]}")" dev "$interface"
    run ip link set dev "$interface" mtu "$mtu" up
    for index in "${!names[@]}"; do
        [[ "$index" == "$own" ]] || run ip route replace "$(with_prefix "${addresses[index]}")" dev "$interface"
    done
    $dry_run || report_up "$key"
}

report_up() {
    local index
    if [[ "${keys[own]}" == - ]]; then
        echo "$own_site's line for everyone's peers file:"
        echo "  $own_site $1 ${endpoints[own]} ${addresses[own]}"
    fi
    echo "$own_site is ${addresses[own]} on $interface"
    for index in "${!names[@]}"; do
        if [[ "$index" == "$own" ]]; then
            continue
        elif [[ "${keys[index]}" == - ]]; then
            echo "  ${names[index]}: no key in $peers_file yet; run \`up\` again when it has one"
        elif [[ "${endpoints[own]}" == - && "${endpoints[index]}" == - ]]; then
            echo "  ${names[index]}: cannot be reached, neither it nor $own_site has an endpoint"
        else
            echo "  ${names[index]}: ${addresses[index]}"
        fi
    done
    echo "sites of a run advertise it with --replica.hostname ${addresses[own]}"
}

status() {
    read_peers
    $dry_run && run wg show "$interface" dump && return
    exists || fail "there is no $interface here: \`up\` makes it"
    local key address handshake received sent index
    printf '%-16s %-16s %-22s %14s %14s\n' site address "last heard" "bytes received" "bytes sent"
    while read -r key _ _ address handshake received sent _; do
        for index in "${!names[@]}"; do
            [[ "${keys[index]}" == "$key" ]] || continue
            if ((handshake)); then
                handshake="$(($(date +%s) - handshake)) s ago"
            else
                handshake="never"
            fi
            printf '%-16s %-16s %-22s %14s %14s\n' "${names[index]}" "${address%/*}" "$handshake" "$received" "$sent"
        done
    done < <(wg show "$interface" dump | tail -n +2)
}

down() {
    if ! $dry_run; then
        exists || fail "there is no $interface here"
        check_is_ours
    fi
    run ip link delete dev "$interface"
}

command="${1:---help}"
(($#)) && shift
case "$command" in
    up | status | down)
        parse_arguments "$@"
        check_surroundings
        "$command"
        ;;
    -h | --help | help) usage ;;
    *) fail "$command: must be up, status or down; --help explains them" ;;
esac
