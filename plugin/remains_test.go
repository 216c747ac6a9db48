package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/pkg/skel"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// A thousand pods that came and went leave no more behind than one: nothing.
func TestManyAddsAndDelsLeaveNothingBehind(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, way way) {
		rounds := 1000
		if way.via == attach.ViaTCX { // each ADD waits for RCU grace periods
			rounds = 100
		}
		pod, neighbour := w.node.AddPod(t), w.node.AddPod(t)
		w.add(neighbour).must(t)
		w.putEvidence(neighbour)
		before, objects, files := w.state(), w.kernelObjects(), openFiles(t)
		args := w.args(pod, w.stdin(fields{"prevResult": prevResult(pod)}))
		for i := range rounds {
			args.ContainerID = fmt.Sprintf("container%d", i)
			w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Add }, args).must(t)
			w.delWith(args).must(t)
		}
		w.wantState(before)
		var left map[string]int
		if !polltest.Within(polltest.Limit, func() bool {
			left = w.kernelObjects()
			return fmt.Sprint(left) == fmt.Sprint(objects)
		}) {
			t.Errorf("the kernel has %v, before %v", left, objects)
		}
		if n := openFiles(t); n > files {
			t.Errorf("%d files are open, %d before", n, files)
		}
		w.check(neighbour).must(t)
		if keys := w.evidence(neighbour); len(keys) != 2 {
			t.Errorf("remaining evidence of the neighbour: %v", keys)
		}
	})
}

// kernelObjects counts the programs that use the world's maps, and the links of these programs, whether pinned or not.
func (w *world) kernelObjects() map[string]int {
	w.t.Helper()
	programs, err := w.programs()
	if err != nil {
		w.t.Fatal(err)
	}
	links := new(link.Iterator)
	defer links.Close() //nolint:errcheck // a test's
	count := map[string]int{"programs": len(programs), "links": 0}
	for links.Next() {
		if info, err := links.Link.Info(); err == nil && slices.Contains(programs, info.Program) {
			count["links"]++
		}
	}
	if err := links.Err(); err != nil {
		w.t.Fatal(err)
	}
	return count
}

// programs returns the programs that use the world's map of devices.
func (w *world) programs() (using []ebpf.ProgramID, err error) {
	devices, err := ebpf.LoadPinnedMap(filepath.Join(w.bpfDir(), datapath.ABI, "devices"), nil)
	if err != nil {
		return nil, err
	}
	defer devices.Close() //nolint:errcheck // only read
	info, err := devices.Info()
	if err != nil {
		return nil, err
	}
	id, _ := info.ID()
	for p := ebpf.ProgramID(0); ; {
		p, err = ebpf.ProgramGetNextID(p)
		if errors.Is(err, os.ErrNotExist) { // that was the last one
			return using, nil
		}
		if err != nil {
			return nil, err
		}
		if uses(p, id) {
			using = append(using, p)
		}
	}
}

func uses(id ebpf.ProgramID, m ebpf.MapID) bool {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false // unloaded meanwhile
	}
	defer program.Close() //nolint:errcheck // only read
	info, err := program.Info()
	if err != nil {
		return false
	}
	maps, _ := info.MapIDs()
	return slices.Contains(maps, m)
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}
