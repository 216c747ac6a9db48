package repair

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/logtest"
)

// A pod that cannot be adopted is logged once, and not before an ADD or a DEL would have ended.
func TestUnadoptedPodsAreLogged(t *testing.T) {
	log := &logtest.Log{}
	r := NewRepairer(Config{Log: slog.New(slog.NewTextHandler(log, nil))})
	unknown := map[string]error{"shop/web": errors.New("no record of its network")}
	now := time.Now()
	for _, after := range []time.Duration{0, DeletionGrace / 2, DeletionGrace, 2 * DeletionGrace} {
		r.noteUnadopted(unknown, now.Add(after))
	}
	if n := log.Count("no record of its network"); n != 1 {
		t.Errorf("a pod that cannot be adopted was logged %d times:\n%s", n, log)
	}
	r.noteUnadopted(nil, now)
	r.noteUnadopted(unknown, now.Add(3*DeletionGrace))
	if n := log.Count("no record of its network"); n != 1 {
		t.Errorf("it was logged again, although it was attached meanwhile:\n%s", log)
	}
}
