package bpftest

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// QuestionKeys holds the secret keys of loaded programs.
type QuestionKeys []byte

// Question returns the two hashes by which the programs identify a request: NH (RFC 4418, section 5.2) of its bytes in 32-bit
// words.
func (k QuestionKeys) Question(request string) (hash, check uint64) {
	key := func(i int) uint32 { return binary.LittleEndian.Uint32(k[4*i:]) }
	padded := append([]byte(request), make([]byte, -len(request)&7)...)
	hash, check = uint64(len(request)), uint64(len(request))
	for i := range min(len(padded)/8, len(k)/16) {
		low, high := binary.LittleEndian.Uint32(padded[8*i:]), binary.LittleEndian.Uint32(padded[8*i+4:])
		hash += uint64(low+key(4*i)) * uint64(high+key(4*i+1))
		check += uint64(low+key(4*i+2)) * uint64(high+key(4*i+3))
	}
	return hash, check
}

// KeysOf returns the keys that steer was loaded with.
func KeysOf(t testing.TB, steer *ebpf.Program) QuestionKeys {
	t.Helper()
	info, err := steer.Info()
	if err != nil {
		t.Fatal(err)
	}
	maps, _ := info.MapIDs()
	for _, id := range maps {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close() //nolint:errcheck // read only
		if info, err := m.Info(); err != nil || info.Name != ".rodata" {
			continue
		}
		constants, err := m.LookupBytes(uint32(0))
		if err != nil {
			t.Fatal(err)
		}
		offset, size := constant(t, m, "question_keys")
		return constants[offset:][:size]
	}
	t.Fatal("the program has no constants")
	return nil
}

// constant returns the position of a constant in the map of constants.
func constant(t testing.TB, m *ebpf.Map, name string) (offset, size uint32) {
	t.Helper()
	handle, err := m.Handle()
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close() //nolint:errcheck // read only
	spec, err := handle.Spec(nil)
	if err != nil {
		t.Fatal(err)
	}
	var section *btf.Datasec
	if err := spec.TypeByName(".rodata", &section); err != nil {
		t.Fatal(err)
	}
	for _, v := range section.Vars {
		if v.Type.TypeName() == name {
			return v.Offset, v.Size
		}
	}
	t.Fatalf("no constant %s", name)
	return 0, 0
}
