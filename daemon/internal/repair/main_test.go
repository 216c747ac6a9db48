package repair

import (
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
)

func TestMain(m *testing.M) { bpftest.RunInOwnCgroup(m.Run) }
