package main

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/probelet/probelet/daemon/internal/flagenv"
)

const (
	repository = "../../.."
	chart      = repository + "/cni-conf/helm/probelet"
)

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A flag of the daemon is given in the chart by a value of its own, or under config; and these are all.
func TestChartKnowsTheFlags(t *testing.T) {
	// The file of specs would be in the image, and a node's name is not all nodes'.
	var said = []string{"specs", "node-name"}
	for _, variable := range regexp.MustCompile(`(?m)^- name: PROBELET_([A-Z_]+)$`).FindAllStringSubmatch(read(t, chart+"/templates/_environment.tpl"), -1) {
		said = append(said, strings.ToLower(strings.ReplaceAll(variable[1], "_", "-")))
	}
	if len(said) < 8 {
		t.Fatalf("the chart sets only %s", said)
	}
	var schema struct {
		Properties struct {
			Config struct {
				Properties           map[string]any
				AdditionalProperties *bool
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, chart+"/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	config := schema.Properties.Config
	if config.AdditionalProperties == nil || *config.AdditionalProperties {
		t.Error("config takes anything")
	}
	for name := range config.Properties {
		said = append(said, name)
	}
	var flags []string
	runCommand(io.Discard).Flags().VisitAll(func(f *pflag.Flag) { flags = append(flags, f.Name) })
	slices.Sort(said)
	slices.Sort(flags)
	if !slices.Equal(said, flags) {
		t.Errorf("the chart has\n%s\nand the flags are\n%s", said, flags)
	}
}

// An environment that was written by hand may have anything.
func TestMisspeltVariables(t *testing.T) {
	environ := []string{"PATH=/bin", "PROBELET_MODE=answer", "PROBELET_STALENES=2", "PROBELET_CNI_BIN_DIR=/x", "PROBELETS=1"}
	if got := flagenv.Unknown(runCommand(io.Discard).Flags(), environ); !slices.Equal(got, []string{"PROBELET_STALENES"}) {
		t.Errorf("%q", got)
	}
}

// What the Dockerfile copies and builds is there, is not kept from it, and is what the manifests run.
func TestDockerfile(t *testing.T) {
	text := strings.ReplaceAll(read(t, repository+"/Dockerfile"), "\\\n", "")
	var copied, built []string
	for _, line := range regexp.MustCompile(`(?m)^COPY (go.*) \./$`).FindAllStringSubmatch(text, -1) {
		copied = append(copied, strings.Fields(line[1])...)
	}
	for _, line := range regexp.MustCompile(`go build .*? -o (\S+) (\S+)`).FindAllStringSubmatch(text, -1) {
		copied = append(copied, strings.TrimSuffix(line[2], "/..."))
		if dirs, ok := strings.CutSuffix(line[2], "/..."); ok {
			mains, err := filepath.Glob(filepath.Join(repository, dirs, "*/main.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, main := range mains {
				built = append(built, line[1]+filepath.Base(filepath.Dir(main)))
			}
		} else {
			built = append(built, line[1])
		}
	}
	if !slices.Equal(built, []string{"/out/probelet", "/out/probeletctl", "/out/probeletd"}) {
		t.Errorf("it builds %s", built)
	}
	if !strings.Contains(text, `ENTRYPOINT ["/usr/local/bin/probeletd"]`) || !strings.Contains(text, "COPY --from=build /out/ /usr/local/bin/") {
		t.Error("the manifests' args are probeletd's")
	}
	ignored := read(t, repository+"/.dockerignore")
	for _, name := range append(copied, "bpf/datapath/probelet_bpfel.o") {
		if _, err := os.Stat(filepath.Join(repository, name)); err != nil {
			t.Error(err)
		}
		for lines := bufio.NewScanner(strings.NewReader(ignored)); lines.Scan(); {
			if strings.HasPrefix(filepath.Join("/", name)+"/", lines.Text()) {
				t.Errorf("%s is kept from the build by %q", name, lines.Text())
			}
		}
	}
}
