package attach_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
)

func (w *world) inspector() (i *attach.Inspector) {
	w.t.Helper()
	w.must(w.inNode(func() (err error) {
		i, err = attach.NewInspector(w.d, w.bpfDir)
		return err
	}))
	w.t.Cleanup(func() { _ = i.Close() })
	return i
}

// inspect checks the attachment with an inspector after some rounds, and after enough time that unchanged pins are not read
// again.
func (w *world) inspect(i *attach.Inspector) error {
	w.t.Helper()
	return w.inNode(func() error {
		c, err := i.Begin()
		if err != nil {
			return err
		}
		return c.Check(w.id, w.pod.IfIndex)
	})
}

func (w *world) inspectOften(i *attach.Inspector) {
	w.t.Helper()
	past := time.Now().Add(-time.Minute)
	w.must(os.Chtimes(w.dir(), past, past))
	for range 3 {
		w.must(w.inspect(i))
	}
}

// An inspector that caches what it has read finds what is missing, like one that looks for the first time, and accepts the attachment
// once it has been repaired.
func TestInspectorFindsDamage(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		i := w.inspector()
		for piece, breakIt := range breakages {
			t.Run(piece, func(t *testing.T) {
				w := w.in(t)
				defer w.detach()
				w.attach(way)
				w.inspectOften(i)
				if !breakIt(w, way) {
					return
				}
				for range 2 {
					if err := w.inspect(i); !errors.Is(err, attach.ErrIncomplete) {
						t.Errorf("%v, want %v", err, attach.ErrIncomplete)
					} else {
						t.Log(err)
					}
				}
				w.attach(way)
				w.inspectOften(i)
			})
		}
		w.attach(way)
		w.inspectOften(i)
		w.detach()
		if err := w.inspect(i); !errors.Is(err, attach.ErrNotAttached) {
			t.Errorf("%v, want %v", err, attach.ErrNotAttached)
		}
	})
}

// If notifications are lost (ENOBUFS), all filters are read again.
func TestInspectorRecoversFromLostNotifications(t *testing.T) {
	w := newWorld(t)
	i := w.inspector()
	w.attach(way{attach.HookTC, attach.ViaClsact})
	w.inspectOften(i)
	w.must(w.inNode(func() error { // of another device
		loopback, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		qdisc := &netlink.GenericQdisc{QdiscType: "pfifo", QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: loopback.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT,
		}}
		for range 500 { // more than the socket can hold
			if err := errors.Join(netlink.QdiscAdd(qdisc), netlink.QdiscDel(qdisc)); err != nil {
				return err
			}
		}
		return nil
	}))
	w.takeOff("steer", "egress")
	if err := w.inspect(i); !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("%v, want %v", err, attach.ErrIncomplete)
	}
}
