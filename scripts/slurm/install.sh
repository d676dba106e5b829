#!/bin/sh
# Installs a Slurm that tests can start by themselves (Debian, Ubuntu): its programs and iproute2. Starts no service.
set -eu
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && command -v ip >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "install.sh: error: needs root to install packages; run it as root" >&2
    exit 2
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: error: no apt-get here; install slurmctld, slurmd, Slurm's client programs and iproute2" >&2
    exit 2
fi
# Package scripts start services through policy-rc.d where there is one; tests want none of them.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2
