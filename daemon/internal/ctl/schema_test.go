//go:build linux

package ctl

import (
	"encoding/json"
	"flag"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/schematest"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

var update = flag.Bool("update", false, "write docs/status.schema.json")

const schemaFile = "../../../docs/status.schema.json"

// The documented schema matches the types. To update it: go test ./daemon/internal/ctl -run Schema -update
func TestSchemaIsDocumented(t *testing.T) {
	schematest.Document(t, schemaFile, "probeletctl status -o json", &survey.Status{}, *update,
		"survey", "statedir", "probe", "api", "status", "store")
}

// The output matches the documented schema.
func TestOutputMatchesTheSchema(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	empty, full := newMachine(t), newMachine(t)
	empty.Kernel = nil
	full.Daemon()
	e := surveytest.Endpoint(probe.HTTP, 8080, "/ready")
	e.HeadersID, e.InstanceID, e.StalenessCapped, e.Refresh = "abcd", "b", true, 5
	full.Kernel.NeighboursOf = map[int][]attach.Neighbour{7: {{Hook: "xdp", What: "XDP program 3", Before: true}}}
	full.Web(surveytest.Maps{
		datapath.PortKey(8080):           {Evidence: surveytest.Success(4, 7, 0), Tally: surveytest.Withdrawn(9)},
		surveytest.KeyOf(8080, "/ready"): {Evidence: surveytest.Success(4, 7, 204), Tally: datapath.Tally{Hits: 3, AnsweredAt: surveytest.Now}},
	}, e, surveytest.Endpoint(probe.TCP, 81, ""))
	full.Lose("unobserved")
	for name, m := range map[string]*machine{"nothing loaded": empty, "something": full} {
		var value any
		if err := json.Unmarshal([]byte(m.status("-o", "json")), &value); err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(value); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := schema.Validate(map[string]any{"daemon": map[string]any{"running": "yes"}}); err == nil {
		t.Error("the schema accepts anything")
	}
}
