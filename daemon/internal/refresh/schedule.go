package refresh

import (
	"bytes"
	"container/heap"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// podConnections limits the open connections to one pod. A pod that keeps them open delays only its own refresh.
	podConnections = 4
	// podApart is the mean time between two connections to one pod: 20 per second suffice for twenty endpoints probed
	// every second, or two at the shortest interval. Beyond that the pod's endpoints are refreshed less often than
	// configured.
	podApart = 50 * time.Millisecond
	// longestSlot limits the length of the slots in which requests begin together, because waking up takes several times as much CPU
	// as a request.
	longestSlot = 250 * time.Millisecond
	// fewestSlots is per interval, so that a request is early by a quarter of it at most.
	fewestSlots = 4
)

// slotLength returns the length of the target's slots, which divide its interval.
func (t Target) slotLength() uint64 {
	slots := max(fewestSlots, (t.Interval+longestSlot-1)/longestSlot)
	return uint64(max(1, t.Interval/slots))
}

// slotOf returns the beginning of the slot that a time is in.
func (t Target) slotOf(at uint64) uint64 { return at - at%t.slotLength() }

// Target is an endpoint to refresh, and how.
type Target struct {
	Endpoint probe.Endpoint // of kind HTTP or TCP
	Address  netip.Addr
	// Request is sent unchanged: the recorded request of a successful probe. HTTP only.
	Request  []byte
	Question probe.Question // of Request
	Timeout  time.Duration
	// Interval is the longest time between the beginnings of two requests, as far as the pod's limits allow. A request may begin up
	// to one slot early.
	Interval time.Duration
}

func (t Target) equal(o Target) bool {
	return t.Endpoint == o.Endpoint && t.Address == o.Address && t.Question == o.Question &&
		t.Timeout == o.Timeout && t.Interval == o.Interval && bytes.Equal(t.Request, o.Request)
}

// job is a target with its place in the schedule.
type job struct {
	Target
	pod     *pod
	request probe.Request // parsed

	at       uint64 // when the job is due: to begin, or to be given up
	index    int    // in the heap; -1 if not in it
	began    uint64 // when the current request began; 0 if there is none
	reserved bool   // the job has waited for the pod's rate limit
	conn     *conn  // of the current request; nil if not opened yet
}

// deadline returns when to give up the current request.
func (j *job) deadline() uint64 { return j.began + uint64(j.Timeout) }

// pod holds the limits of requests to one pod.
type pod struct {
	id      attach.ID
	jobs    map[probe.Endpoint]*job
	open    int    // requests under way
	free    uint64 // when the rate limit permits the next request
	waiting []*job // jobs waiting for a request to end
}

// schedule decides when each target is due. All times are in ns of one clock.
type schedule struct {
	pods map[attach.ID]*pod
	due  jobs
}

func newSchedule() *schedule { return &schedule{pods: map[attach.ID]*pod{}} }

// set replaces a pod's targets, and returns the jobs that end. Unchanged targets keep their place.
func (s *schedule) set(id attach.ID, targets []Target, now uint64) (ended []*job) {
	p := s.pods[id]
	if p == nil {
		if len(targets) == 0 {
			return nil
		}
		p = &pod{id: id}
		s.pods[id] = p
	}
	old := p.jobs
	p.jobs = make(map[probe.Endpoint]*job, len(targets))
	for _, t := range targets {
		if j := old[t.Endpoint]; j != nil && j.equal(t) {
			p.jobs[t.Endpoint] = j
			delete(old, t.Endpoint)
			continue
		}
		// Spread out targets that arrive together, such as when the daemon starts.
		j := &job{Target: t, pod: p, at: max(now, t.slotOf(now+uint64(rand.N(t.Interval)))), index: -1}
		if t.Endpoint.Kind.Keying() == probe.KeyedByRequest {
			var err error
			if j.request, err = probe.ParseRequest(t.Request); err != nil {
				continue // not a request that was ever recorded, so there is nothing to send
			}
		}
		p.jobs[t.Endpoint] = j
		heap.Push(&s.due, j)
	}
	for _, j := range old {
		s.drop(j, now)
		ended = append(ended, j)
	}
	if len(p.jobs) == 0 {
		delete(s.pods, id)
	}
	return ended
}

func (s *schedule) unchanged(id attach.ID, targets []Target) bool {
	p := s.pods[id]
	if p == nil {
		return len(targets) == 0
	}
	for _, t := range targets {
		if j := p.jobs[t.Endpoint]; j == nil || !j.equal(t) {
			return false
		}
	}
	return len(targets) == len(p.jobs)
}

func (s *schedule) drop(j *job, now uint64) {
	if j.index >= 0 {
		heap.Remove(&s.due, j.index)
	}
	for i, w := range j.pod.waiting {
		if w == j {
			j.pod.waiting = append(j.pod.waiting[:i], j.pod.waiting[i+1:]...)
			break
		}
	}
	if j.began != 0 {
		s.release(j, now)
	}
}

// next returns a job that is due, or nil if there is none. If it has a request under way, that must be checked;
// otherwise one must begin.
func (s *schedule) next(now uint64) *job {
	for len(s.due) > 0 && s.due[0].at <= now {
		j := heap.Pop(&s.due).(*job)
		p := j.pod
		switch {
		case j.began != 0:
			return j
		case !j.reserved && p.free >= now+j.slotLength(): // requests of a slot may begin together
			j.reserved = true
			s.plan(j, p.free)
			p.free += uint64(podApart)
			continue
		case !j.reserved:
			j.reserved = true
			p.free = max(p.free, now) + uint64(podApart)
		}
		if p.open == podConnections {
			p.waiting = append(p.waiting, j)
			continue
		}
		p.open++
		j.began, j.reserved = now, false
		return j
	}
	return nil
}

// plan schedules the job for a time.
func (s *schedule) plan(j *job, at uint64) {
	j.at = at
	if j.index < 0 {
		heap.Push(&s.due, j)
		return
	}
	heap.Fix(&s.due, j.index)
}

// end ends the job's request, and schedules the next one.
func (s *schedule) end(j *job, now uint64) {
	began := j.began
	s.release(j, now)
	s.plan(j, max(now, j.slotOf(began+uint64(j.Interval))))
}

func (s *schedule) release(j *job, now uint64) {
	p := j.pod
	j.began = 0
	p.open--
	if len(p.waiting) > 0 {
		first := p.waiting[0]
		p.waiting = p.waiting[1:]
		s.plan(first, now)
	}
}

// jobs is a heap of jobs by time (container/heap).
type jobs []*job

func (h jobs) Len() int           { return len(h) }
func (h jobs) Less(i, j int) bool { return h[i].at < h[j].at }
func (h jobs) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *jobs) Push(x any) {
	j := x.(*job)
	j.index = len(*h)
	*h = append(*h, j)
}

// Pop implements heap.Interface.
func (h *jobs) Pop() any {
	last := len(*h) - 1
	j := (*h)[last]
	(*h)[last], *h = nil, (*h)[:last]
	j.index = -1
	return j
}
