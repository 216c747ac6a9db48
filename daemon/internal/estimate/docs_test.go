package estimate

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/schematest"
)

var update = flag.Bool("update", false, "write docs/estimate.schema.json, and the output in docs/estimate.md")

const (
	schemaFile = "../../../docs/estimate.schema.json"
	pageFile   = "../../../docs/estimate.md"
)

// execute runs the command as a program does.
func execute(t *testing.T, stdin io.Reader, width int, args ...string) (string, error) {
	t.Helper()
	var out strings.Builder
	cmd := Command(Environment{
		Stdin: stdin, Stdout: &out,
		Width:     func() int { return width },
		Config:    func() (*rest.Config, error) { return &rest.Config{}, fmt.Errorf("no cluster") },
		Namespace: func() (string, error) { return "", nil },
	})
	cmd.SetArgs(args)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// The documented schema matches the types. To update it: go test ./daemon/internal/estimate -run Documented -update
func TestSchemaIsDocumented(t *testing.T) {
	schematest.Document(t, schemaFile, "probeletctl estimate -o json", &Report{}, *update, "estimate", "probe")
}

func TestOutputFitsTheSchema(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"one pod": podText("a", "", "", "", "image: x"),
		"many": podText("a", "", "nodeName: n1", "", lone) + podText("b", "", "hostNetwork: true", "", lone) +
			podText("c", "", "", "phase: Failed", lone) + "---\nkind: Job\n",
	} {
		out, err := execute(t, strings.NewReader(text), 0, "-o", "json", "-f", "-")
		if err != nil {
			t.Fatal(err)
		}
		var value any
		if err := json.Unmarshal([]byte(out), &value); err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(value); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if err := schema.Validate(map[string]any{"total": "all"}); err == nil {
		t.Error("anything fits the schema")
	}
}

// block returns the fenced block that follows a text on a page, and where it is.
func block(t *testing.T, page, after string) (text string, from, to int) {
	t.Helper()
	at := strings.Index(page, after)
	if at < 0 {
		t.Fatalf("%s: %q is missing", pageFile, after)
	}
	open := at + len(after) + strings.Index(page[at+len(after):], "\n```")
	from = open + 1 + strings.Index(page[open+1:], "\n") + 1
	to = from + strings.Index(page[from:], "```")
	return page[from:to], from, to
}

// The command prints what the page shows, for the pods that the page creates.
func TestPageIsWhatIsPrinted(t *testing.T) {
	const width = 140 // as the page's command says
	page := read(t, pageFile)
	script, _, _ := block(t, page, "<!-- pods -->")
	sh := exec.Command("sh", "-e", "-c", script)
	sh.Dir = t.TempDir()
	if out, err := sh.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want, err := execute(t, nil, width, "--file", filepath.Join(sh.Dir, "pods.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	got, from, to := block(t, page, "<!-- output -->")
	if _, printed, _ := strings.Cut(got, "\n"); printed != want {
		if !*update {
			t.Errorf("%s does not have what is printed (-update writes it):\n%s", pageFile, want)
			return
		}
		command, _, _ := strings.Cut(got, "\n")
		if err := os.WriteFile(pageFile, []byte(page[:from]+command+"\n"+want+page[to:]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
