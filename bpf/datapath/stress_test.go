package datapath

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// runner passes one packet through a program repeatedly, concurrently with others.
type runner struct {
	program *ebpf.Program
	options ebpf.RunOptions
	out     []byte
}

func newRunner(program *ebpf.Program, frame []byte) *runner {
	r := &runner{program: program, out: make([]byte, 2048)}
	var context [48]uint32
	context[10] = benchIfindex // struct __sk_buff, ifindex
	r.options = ebpf.RunOptions{Data: frame, Context: context[:]}
	return r
}

func (r *runner) run() (verdict uint32, frame []byte, err error) {
	r.options.DataOut = r.out
	verdict, err = r.program.Run(&r.options)
	return verdict, r.options.DataOut, err
}

// keepPortsInUse makes the filter let packets of these clients through, whichever flows come and go.
func (b *bench) keepPortsInUse(ports ...uint16) {
	b.t.Helper()
	content, err := b.bss.LookupBytes(uint32(0))
	must(b.t, err)
	for _, port := range ports {
		content[int(carrying.flowPorts)+int(port%flowPortSlots)*4+3] = 1 // a count that never reaches 0
	}
	must(b.t, b.bss.Put(uint32(0), content))
}

// flowOf returns the key of a connection of the client, as the programs know it.
func (b *bench) flowOf() probeletFlowKey {
	return probeletFlowKey{
		ClientAddr: b.client.Addr().As16(), PodAddr: b.srv.Addr().As16(), Ifindex: benchIfindex,
		ClientPort: b.client.Port(), PodPort: b.srv.Port(),
	}
}

// The kernel reuses the memory of a deleted element immediately. However evidence comes and goes meanwhile, an answer always matches
// the request.
func TestAnswersNeverMixEndpoints(t *testing.T) {
	const askers, answersEach, neighbours = 3, 10_000, 16
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		text := func(i int) string { return strings.Replace(request, "/healthz", fmt.Sprintf("/%08d", i), 1) }
		evidence := map[probeletEndpointKey]Evidence{}
		for i := range neighbours {
			e := success(t, 200+i, time.Hour)
			e.Check = question(text(i)).Check
			b.putFor(text(i), e)
			evidence[HTTPKey(8080, question(text(i))).of(b.key)] = e
		}
		var stop atomic.Bool
		var renewing, asking sync.WaitGroup
		renewing.Go(func() {
			for round := 0; !stop.Load(); round++ {
				if err := churn(b.d.objects.EndpointEvidence, evidence, round); err != nil {
					t.Error(err)
					return
				}
			}
		})
		first := b.client
		for i := range askers {
			b.client = another(first, uint16(i))
			b.keepPortsInUse(b.client.Port())
			asker := b.asker(text(i), fmt.Sprintf("HTTP/1.1 %d ", 200+i))
			asking.Go(func() {
				if err := asker.ask(answersEach); err != nil {
					t.Error(err)
				}
			})
		}
		asking.Wait()
		stop.Store(true)
		renewing.Wait()
	})
}

// churn renews some evidence, and removes and re-adds some.
func churn(m *ebpf.Map, evidence map[probeletEndpointKey]Evidence, round int) error {
	for key, e := range evidence { // in a different order each time
		if round%3 != 0 {
			if err := m.Delete(key); err != nil {
				return err
			}
		}
		e.ObservedAt += uint64(round)
		if err := m.Put(key, sealed(key, e)); err != nil {
			return err
		}
	}
	return nil
}

// asker sends one request on one connection, which it then restores.
type asker struct {
	*runner
	flows *ebpf.Map
	key   probeletFlowKey
	flow  probeletFlow
	want  string // the beginning of each answer
	hook  Hook
	pass  *ebpf.Program
}

func (b *bench) asker(text, want string) *asker {
	const ourISN = 4711
	a := &asker{flows: b.d.objects.Flows, key: b.flowOf(), want: want, hook: b.hook, pass: b.d.Respond()}
	a.flow = probeletFlow{
		StartedAt: Now(), Deadline: Now() + uint64(time.Hour), Generation: b.key.Generation, ClientIsn: b.isn, OurIsn: ourISN,
		ClientMss: clientMSS, State: taken, Flags: connected | byXDP*uint32(b.hook),
	}
	a.runner = newRunner(b.d.Steer(), b.toPod("PA", b.isn+1, ourISN+1, text).Bytes(b.t, nil))
	return a
}

// ask continues until it has received the given number of answers. While the endpoint has no evidence, requests are handed over.
func (a *asker) ask(answers int) error {
	for answers > 0 {
		a.flow.StartedAt = Now()
		if err := a.flows.Put(a.key, a.flow); err != nil {
			return err
		}
		verdict, frame, err := a.run()
		if err != nil {
			return err
		}
		if verdict == tcPass {
			continue
		}
		if a.hook == HookXDP {
			if frame, err = a.respond(frame); err != nil {
				return err
			}
		}
		if !strings.Contains(string(frame), a.want) {
			return fmt.Errorf("asked for %q, got %q", a.want, frame)
		}
		answers--
	}
	return nil
}

func (a *asker) respond(frame []byte) ([]byte, error) {
	// struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
	context := []uint32{0, uint32(len(frame)), 0, benchIfindex, 0, 0}
	options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, 2048), Context: context}
	_, err := a.pass.Run(&options)
	return options.DataOut, err
}

// withdrawn_at is the time of the latest withdrawal, whichever CPU writes first.
func TestConcurrentWithdrawals(t *testing.T) {
	const withdrawers, each = 2, 10_000
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		key := b.asked().of(b.key)
		var stop atomic.Bool
		var watching, withdrawing sync.WaitGroup
		watching.Go(func() {
			for last := (Tally{}); !stop.Load(); {
				var now Tally
				if err := b.d.objects.EndpointTallies.Lookup(key, &now); err != nil || now.WithdrawnAt < last.WithdrawnAt {
					t.Errorf("withdrawn at %d, before that at %d (%v)", now.WithdrawnAt, last.WithdrawnAt, err)
					return
				}
				last = now
			}
		})
		first := b.client
		for i := range withdrawers {
			b.client = another(first, uint16(i))
			b.keepPortsInUse(b.client.Port())
			flow := probeletFlow{
				StartedAt: Now(), Deadline: Now() + uint64(time.Hour), Generation: b.key.Generation, ClientIsn: b.isn, PodIsn: podISN,
				State: observing, Flags: connected | requested,
			}
			flow.Question.Hash = key.Hash
			of, r := b.flowOf(), newRunner(b.d.Observe(), b.fromPod("PA", podISN+1, b.isn+1, "HTTP/1.1 500 x\r\n\r\n").Bytes(t, nil))
			withdrawing.Go(func() {
				for range each {
					if err := withdrawOnce(b.d, r, of, flow, key); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		withdrawing.Wait()
		stop.Store(true)
		watching.Wait()
		b.records()
	})
}

// withdrawOnce lets the pod fail a probe and asserts that the failure is not forgotten.
func withdrawOnce(d *Datapath, r *runner, of probeletFlowKey, flow probeletFlow, key probeletEndpointKey) error {
	if err := d.objects.Flows.Put(of, flow); err != nil {
		return err
	}
	before := Now()
	if _, _, err := r.run(); err != nil {
		return err
	}
	var tally Tally
	if err := d.objects.EndpointTallies.Lookup(key, &tally); err != nil {
		return err
	}
	if tally.WithdrawnAt < before {
		return fmt.Errorf("withdrawn at %d, %d ns before the pod failed", tally.WithdrawnAt, before-tally.WithdrawnAt)
	}
	return nil
}
