#!/usr/bin/env bash
# A Slurm of two one-core nodes on this machine, for tests: cluster.sh start FOLDER, then SLURM_CONF=FOLDER/slurm.conf.
# cluster.sh kill FOLDER NODE plays a node that dies with all that runs on it; cluster.sh stop FOLDER ends everything.
# As root; needs Debian's slurm-wlm, slurmctld, slurmd and munge.
set -euo pipefail
action=$1 folder=$(realpath -m "$2")

pid_of() { cat "$folder/$1.pid" 2> /dev/null; }

end_node() {
    # A dead slurmd leaves its jobs alive, and they would go on writing.
    local daemon
    daemon=$(pid_of "slurmd_$1") || return 0
    kill -9 "$daemon" 2> /dev/null || true
    pkill -9 -f "slurmstepd: .*$folder" 2> /dev/null || true
    for job in $(SLURM_CONF=$folder/slurm.conf squeue -h -w "$1" -o %A 2> /dev/null); do
        for step in $(pgrep -f "slurmstepd: \[$job\." || true); do
            pkill -9 -P "$step" || true
            kill -9 "$step" || true
        done
    done
    for script in $(pgrep -f "$folder/spool_$1/job" || true); do
        pkill -9 -P "$script" || true
        kill -9 "$script" 2> /dev/null || true
    done
    rm -f "$folder/slurmd_$1.pid"
}

case $action in
start)
    mkdir -p "$folder" /run/munge /etc/munge
    if ! munge -n < /dev/null > /dev/null 2>&1; then
        [ -f /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2> /dev/null
        chmod 400 /etc/munge/munge.key
        chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
        setpriv --reuid=munge --regid=munge --clear-groups munged
        touch "$folder/munged_is_ours"
    fi
    host=$(hostname)
    mkdir -p "$folder/state"
    cat > "$folder/slurm.conf" << END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SlurmdTimeout=15
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool_%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd_%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd_%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo -h -t idle -o %D 2> /dev/null)" = 2 ] && exit 0
        sleep 1
    done
    sinfo >&2
    exit 1
    ;;
kill)
    end_node "$3"
    ;;
stop)
    export SLURM_CONF=$folder/slurm.conf
    scancel -u root 2> /dev/null || true
    sleep 1
    end_node n1
    end_node n2
    kill -9 "$(pid_of slurmctld)" 2> /dev/null || true
    if [ -f "$folder/munged_is_ours" ]; then pkill -x munged || true; fi
    ;;
esac
