#!/bin/bash
# Runs the tests of bpf/datapath, bpf/attach and bpf/veth on another kernel in an emulator.
# Usage: oldkernel.sh [DEBIAN_KERNEL_PACKAGE [TEST_PATTERN]]
# Needs the Debian packages qemu-system-x86, busybox-static, cpio and kmod. Downloads the kernel package but installs nothing.
set -euo pipefail

pattern=${2:-.}
package=${1:-linux-image-cloud-amd64}
kernel=$(apt-cache depends "$package" | awk '/Depends: linux-image/ {print $2}') # resolves a metapackage
package=${kernel:-$package}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
chmod 777 . # apt downloads as another user
apt-get download "$package" >/dev/null
dpkg-deb -x ./*.deb kernel
version=$(basename kernel/boot/vmlinuz-* | sed 's/vmlinuz-//')
depmod -b kernel "$version"

mkdir -p image/{bin,dev,proc,sys,tmp,run,var,tests,lib/modules}
ln -s /run image/var/run
cp "$(command -v busybox)" image/bin/busybox
# The modules that the tests need, in loading order.
for module in veth sch_ingress cls_bpf bridge ipv6 macvlan dummy nft_ct nft_fib_inet sch_tbf ifb cls_u32 act_mirred br_netfilter; do
	modprobe -d kernel -S "$version" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" {print $2}'
done | awk '!seen[$0]++' | while read -r file; do
	cp "$file" image/lib/modules/
	echo "/lib/modules/$(basename "$file")"
done >image/modules
for test in datapath attach veth; do
	(cd "$root" && CGO_ENABLED=0 go test -c -o "$work/image/tests/$test" "./bpf/$test")
done
cat >image/init <<'INIT'
#!/bin/busybox sh
export PATH=/bin HOME=/ CI=1
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
while read -r module; do insmod "$module" || echo "failed to load $module"; done </modules
ip link set lo up
echo "kernel $(uname -r)"
for test in /tests/*; do
	echo "== $test"
	"$test" -test.timeout 20m -test.run "$(cat /pattern)" && echo "OK $test" || echo "FAILED $test"
done
poweroff -f
INIT
chmod +x image/init
echo "$pattern" >image/pattern
(cd image && find . | cpio -o -H newc --quiet | gzip -1) >initramfs

timeout 1800 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 -nographic -no-reboot -net none \
	-kernel "kernel/boot/vmlinuz-$version" -initrd initramfs -append "console=ttyS0 quiet panic=-1" </dev/null | tee log
! grep -q '^FAILED' log && [ "$(grep -c '^OK /tests/' log)" = 3 ]
