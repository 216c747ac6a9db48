package bench

import (
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// objects are a number of objects of one size, in bytes.
type objects struct{ count, size float64 }

// memory is allocated kernel memory by slab cache, and pins.
type memory map[string]objects

// kernelMemory returns what is currently allocated from those caches that attaching uses and that other processes use little.
// It covers the whole machine, because a memory cgroup is charged only for maps, links and pins, and not for qdiscs, filters
// and a device's list of programs (no GFP_KERNEL_ACCOUNT in net/sched and include/linux/bpf_mprog.h). It does not cover the
// per-CPU counters of a qdisc, some 100 bytes per CPU. Pins are counted separately, because files and directories of other
// processes come and go.
func kernelMemory(t *testing.T, k *kernel) memory {
	t.Helper()
	time.Sleep(5 * settle) // memory freed meanwhile is released after a grace period
	text, err := os.ReadFile("/proc/slabinfo")
	if err != nil {
		t.Fatal(err)
	}
	m, pins := memory{}, objects{count: float64(k.pins(t))}
	for line := range strings.Lines(string(text)) {
		var cache string
		var active, all, size float64
		if _, err := fmt.Sscan(line, &cache, &active, &all, &size); err != nil {
			continue // a heading: slabinfo(5)
		}
		switch {
		case strings.HasPrefix(cache, "kmalloc-"), cache == "radix_tree_node": // the latter holds filter handles
			m[cache] = objects{active, size}
		case cache == "dentry", cache == "inode_cache", cache == "lsm_inode_cache":
			pins.size += size
		}
	}
	m["pins"] = pins
	return m
}

// perPod returns how many objects each pod of the picked batches has. It is a whole number, so that rounding the median batch
// of each cache removes what other processes allocate.
func perPod(batches []memory, picked []int) memory {
	m := memory{}
	for kind, o := range batches[0] {
		var counts []float64
		for _, i := range picked {
			counts = append(counts, batches[i][kind].count/batchPods)
		}
		if count := math.Round(median(counts)); count > 0 { // attaching frees nothing
			m[kind] = objects{count, o.size}
		}
	}
	return m
}

func (m memory) kib() float64 {
	sum := 0.0
	for _, o := range m {
		sum += o.count * o.size / 1024
	}
	return sum
}

func (m memory) String() string {
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s %v × %v B", kind, m[kind].count, m[kind].size))
	}
	return strings.Join(parts, ", ")
}

// addMemory adds the rows for the memory per pod, in KiB, and for that of many pods including the maps, in MiB.
func (s *suite) addMemory(hook variant, batches map[way][]memory, mapBytes float64) {
	const mostPods = 4096
	fixed := mapBytes / (1 << 20)
	all := func(kib float64) float64 { return fixed + kib*mostPods/1024 }
	for _, w := range ways {
		v := variant(fmt.Sprintf("%s, %s", hook, w.name))
		pod := bootstrap(len(batches[w]), func(picked []int) float64 { return perPod(batches[w], picked).kib() })
		s.progress("  per pod with %s: %v", w.name, perPod(batches[w], each(len(batches[w]))))
		total := estimate{all(pod.value), all(pod.low), all(pod.high), pod.rounds}
		s.add("kernel memory of an attached pod with 4 endpoints", v, "", pod, "KiB", hook.mark(atMost(8)))
		s.add(fmt.Sprintf("kernel memory of %d such pods and all maps", mostPods), v, "", total, "MiB", hook.mark(atMost(64)))
	}
	s.add("kernel memory of the maps without any pod", hook, "", estimate{fixed, fixed, fixed, 1}, "MiB", nil)
}

// What a pod has can be separated from what other processes allocate and free meanwhile.
func TestPerPod(t *testing.T) {
	batch := func(pod, others float64) memory {
		return memory{"kmalloc-2k": {2*batchPods + pod, 2048}, "kmalloc-8k": {others, 8192}, "pins": {4 * batchPods, 848}}
	}
	batches := []memory{batch(-3, 4000), batch(12, -9), batch(5000, 20), batch(0, -7000), batch(-20, 15)}
	m := perPod(batches, each(len(batches)))
	if len(m) != 2 || m["kmalloc-2k"].count != 2 || m["pins"].count != 4 {
		t.Errorf("a pod has %v, want two objects of kmalloc-2k and four pins", m)
	}
	if kib := m.kib(); kib != (2*2048+4*848)/1024. {
		t.Errorf("a pod takes %v KiB", kib)
	}
}
