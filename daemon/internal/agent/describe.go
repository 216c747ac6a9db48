package agent

import (
	"errors"
	"os"
	"reflect"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// describeInterval is the shortest time between two descriptions, since one takes longer the more pods there are.
const describeInterval = time.Second

// describe writes for probeletctl, and for the next daemon, what is asked of which attachment, unless it is already written. The next
// daemon believes evidence in the kernel's maps only with the question and the containers that are written here, so what is not
// written yet costs no more than a real probe.
func (ag *agent) describe() {
	ag.outdated, ag.describedAt = false, time.Now()
	description := statedir.Endpoints{}
	for _, r := range ag.records {
		description.Attachments = append(description.Attachments, ag.attachments[r.ID()].describe())
	}
	for _, pod := range ag.unattached(nil) {
		description.Unattached = append(description.Unattached, pod.String())
	}
	if ag.description != nil && reflect.DeepEqual(*ag.description, description) {
		return
	}
	if err := statedir.WriteEndpoints(ag.stateDir, description); err != nil {
		ag.outdated = true // to be retried
		// Without the state directory the daemon ends, and says so.
		if text := err.Error(); text != ag.unwritten && !errors.Is(err, os.ErrNotExist) {
			ag.unwritten = text
			ag.log.Error("failed to write what is probed", "error", err)
		}
		return
	}
	ag.description, ag.unwritten = &description, ""
}

func (a *attachment) describe() statedir.Attachment {
	described := statedir.Attachment{ContainerID: a.record.ContainerID, IfName: a.record.IfName, Pod: a.podName()}
	if a.pod != nil {
		described.Settings = statedir.SettingsOf(a.settings)
	}
	known := a.tracker.Evidence()
	for _, s := range a.tracker.Endpoints() {
		e := statedir.EndpointOf(s, known[s.Endpoint].Question)
		e.Disagreement, e.NotCompared = string(a.barred[s.Endpoint].kind), a.shared[s.Endpoint]
		described.Endpoints = append(described.Endpoints, e)
	}
	return described
}

// asking identifies an endpoint of certain containers.
type asking struct {
	endpoint   probe.Endpoint
	instanceID string
}

// askedBefore returns the questions that the previous daemon knew an attachment's endpoints to be asked.
func (ag *agent) askedBefore(id attach.ID) map[asking]probe.Question {
	asked := map[asking]probe.Question{}
	for _, a := range ag.previous.Attachments {
		if a.ContainerID != id.ContainerID || a.IfName != id.IfName {
			continue
		}
		for _, e := range a.Endpoints {
			if e.Observed {
				asked[asking{e.Endpoint(), e.InstanceID}] = e.Question
			}
		}
	}
	return asked
}
