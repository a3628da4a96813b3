"use strict";
(() => {
  const drawn = JSON.parse(document.getElementById("drawn").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const FONT = "12px system-ui, sans-serif";
  const NUM_COLORS = 8;

  // Colours are light-dark() pairs: only a real element's computed colour says which of the two holds.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const color = name => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };

  const short = value => {
    if (value == null) return "";
    const size = Math.abs(value);
    if (size >= 1e4) return new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4}).format(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return String(+value.toPrecision(4));
  };

  const axis = (label, isBelow) => ({
    stroke: color("muted"), font: FONT, labelFont: FONT, label: label || undefined, labelSize: 18, labelGap: 0,
    grid: {stroke: color("grid"), width: 1}, ticks: {stroke: color("grid"), width: 1, size: 4},
    values: (plot, splits) => splits.map(short),
    ...(isBelow ? {size: 30} : {size: (plot, values) => 18 + 7 * Math.max(...(values || [""]).map(text => text.length))}),
  });

  const lines = (data, box) => {
    const few = data.x.length <= 40;
    return new uPlot({
      width: box.clientWidth, height: 230, padding: [8, 18, 0, 0],
      scales: {x: {time: false}},
      axes: [axis(data.xLabel, true), axis(data.yLabel, false)],
      cursor: {focus: {prox: 24}, drag: {x: true, y: false}, ...(data.sync ? {sync: {key: data.sync}} : {})},
      focus: {alpha: 0.35},
      series: [
        {label: data.xLabel, value: (plot, value) => short(value)},
        ...data.lines.map(line => ({
          label: line.name, stroke: color(`color-${line.color % NUM_COLORS}`), width: line.dashed ? 1.5 : 2,
          dash: line.dashed ? [6, 4] : undefined, spanGaps: true, points: {show: few && !line.dashed, size: 5},
          value: (plot, value) => short(value),
        })),
      ],
    }, [data.x, ...data.values], box);
  };

  // A map is a plot whose points this draws itself: those that were searched for stand out, and names go where
  // there is room.
  const map = (data, box) => {
    const order = data.x.map((_, place) => place).sort((a, b) => data.x[a] - data.x[b]);
    const pick = values => order.map(place => values[place]);
    const [x, y, names] = [pick(data.x), pick(data.y), pick(data.names)];
    const weights = data.weights.length ? pick(data.weights) : x.map(() => 1);
    const heaviest = Math.log1p(Math.max(...weights)) || 1;
    const size = i => data.weights.length ? 2 + 3 * Math.log1p(weights[i]) / heaviest : 3;
    const byWeight = x.map((_, i) => i).sort((a, b) => weights[b] - weights[a]);
    let found = null;

    const draw = plot => {
      const {ctx, bbox} = plot, ratio = devicePixelRatio;
      const at = i => [plot.valToPos(x[i], "x", true), plot.valToPos(y[i], "y", true)];
      const isInside = ([px, py]) =>
        px >= bbox.left && px <= bbox.left + bbox.width && py >= bbox.top && py <= bbox.top + bbox.height;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      const dot = (i, fill, alpha) => {
        const [px, py] = at(i);
        ctx.globalAlpha = alpha;
        ctx.fillStyle = fill;
        ctx.beginPath();
        ctx.arc(px, py, size(i) * ratio, 0, 7);
        ctx.fill();
      };
      const usual = color("color-0"), chosen = color("color-1");
      x.forEach((_, i) => { if (!found?.has(i)) dot(i, usual, found ? 0.15 : 0.5); });
      found?.forEach(i => dot(i, chosen, 1));
      ctx.globalAlpha = 1;
      ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      ctx.textAlign = "left";
      ctx.textBaseline = "middle";
      ctx.fillStyle = color("text");
      const taken = [];
      const wanted = found ? byWeight.filter(i => found.has(i)) : data.hasLabels ? byWeight : [];
      for (const i of wanted) {
        const [px, py] = at(i);
        if (!isInside([px, py])) continue;
        const text = names[i].length > 28 ? names[i].slice(0, 27) + "…" : names[i];
        const left = px + (size(i) + 2) * ratio;
        const place = [left, py - 7 * ratio, left + ctx.measureText(text).width, py + 7 * ratio];
        if (place[2] > bbox.left + bbox.width) continue;
        if (taken.some(other => place[0] < other[2] && other[0] < place[2] && place[1] < other[3] && other[1] < place[3])) continue;
        taken.push(place);
        ctx.fillText(text, left, py);
      }
      ctx.restore();
    };

    const nearest = plot => {
      let best = null, least = 18 * 18;
      x.forEach((_, i) => {
        const [dx, dy] = [plot.valToPos(x[i], "x") - plot.cursor.left, plot.valToPos(y[i], "y") - plot.cursor.top];
        if (dx * dx + dy * dy < least) [best, least] = [i, dx * dx + dy * dy];
      });
      return best;
    };
    const hover = plot => {
      const i = plot.cursor.left >= 0 ? nearest(plot) : null;
      tip.hidden = i === null;
      if (i === null) return;
      tip.textContent = names[i] + (data.weights.length ? ` · ${short(weights[i])}×` : ` · ${short(x[i])}, ${short(y[i])}`);
      const area = plot.over.getBoundingClientRect();
      const left = area.left + plot.cursor.left + 12;
      tip.style.left = `${Math.min(left, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${area.top + plot.cursor.top + 14}px`;
    };

    const wide = values => {
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const margin = 0.04 * (high - low) || 1;
      return [low - margin, high + margin];
    };
    const plot = new uPlot({
      width: box.clientWidth, height: Math.max(420, Math.min(680, box.clientWidth * 0.6)), padding: [8, 18, 0, 0],
      scales: {x: {time: false, range: (u, low, high) => low === Math.min(...x) && high === Math.max(...x) ? wide(x) : [low, high]},
               y: {range: (u, low, high) => low == null || (low === Math.min(...y) && high === Math.max(...y)) ? wide(y) : [low, high]}},
      axes: [axis(data.xLabel, true), axis(data.yLabel, false)],
      legend: {show: false},
      cursor: {drag: {x: true, y: true, uni: 20}, points: {show: false}},
      series: [{}, {paths: () => null, points: {show: false}}],
      hooks: {draw: [draw], setCursor: [hover]},
    }, [x, y], box);

    const search = box.parentElement.querySelector("input"), answer = box.parentElement.querySelector("output");
    const look = () => {
      const text = search.value.trim().toLocaleLowerCase();
      found = text ? new Set(x.map((_, i) => i).filter(i => names[i].toLocaleLowerCase().includes(text))) : null;
      const shown = found ? [...found].sort((a, b) => weights[b] - weights[a]).slice(0, 8).map(i => names[i]) : [];
      answer.textContent = !found ? "" : found.size ? `${found.size} found: ${shown.join(", ")}${found.size > 8 ? ", …" : ""}` : "none found";
      plot.redraw();
    };
    search.oninput = look;
    if (search.value) look();
    return plot;
  };

  const plots = new Map();
  const build = box => {
    plots.get(box)?.destroy();
    const data = drawn[box.dataset.drawn];
    plots.set(box, (data.kind === "map" ? map : lines)(data, box));
  };
  // A chart is made when it comes near, and anew if it becomes wider or narrower; one in a folded section has no width.
  const near = new IntersectionObserver(entries => entries.forEach(entry => {
    if (entry.isIntersecting && !plots.has(entry.target)) build(entry.target);
  }), {rootMargin: "600px"});
  const sized = new ResizeObserver(entries => entries.forEach(({target}) => {
    const plot = plots.get(target);
    if (plot && target.clientWidth && plot.width !== target.clientWidth) {
      plot.setSize({width: target.clientWidth, height: plot.height});
    }
  }));
  document.querySelectorAll(".plot").forEach(box => { near.observe(box); sized.observe(box); });
  const rebuild = () => [...plots.keys()].forEach(build);

  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  // A page that was opened from a file may have no storage.
  const stored = use => { try { return use(localStorage); } catch { return null; } };
  const theme = stored(storage => storage.getItem("embedtrain-theme"));
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  document.getElementById("theme").onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(storage => storage.setItem("embedtrain-theme", root.dataset.theme));
    rebuild();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = rebuild;
  addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
})();
