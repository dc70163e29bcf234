# A tree, copied by tar and by rsync: what each of the copies consists of lies in its manifest.
set -eu
cd /data
step() { read -r up _ </proc/uptime; echo "$1 at ${up%.*} s"; }
step begun
/workload tree tree "$1"
step made
/workload manifest tree >tree.manifest
step described
mkdir by-tar
tar --xattrs --sparse -cf tree.tar -C tree .
tar --xattrs --xattrs-include='user.*' -xpf tree.tar -C by-tar
step "copied by tar"
rsync -aHXS --numeric-ids tree/ by-rsync/
step "copied by rsync"
# A second time there is nothing to do, even if all content is compared.
rsync -aHXSi --checksum --numeric-ids tree/ by-rsync/
echo changed >"by-rsync/part 0/file 5"
rm -r by-rsync/odd
rsync -aHXS --delete --numeric-ids tree/ by-rsync/
step "copied again"
for copy in by-tar by-rsync; do /workload manifest $copy >$copy.manifest; done
step "described"
