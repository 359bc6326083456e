// A plane through the latent space: the bundle's landmarks, and posteriors as ellipses of one standard deviation.

import { drawn } from "./dom.js";

const SIZE = 340;
const REACH = 1.1; // of the farthest that is to be seen
const PRIOR = 1.4; // standard deviations of it that are
const MOST_LABELS = 24;

export class LatentMap {
  /** @param map {centre, plane, points, labels}: see the service's samples. */
  constructor(place, { centre, plane, points, labels }) {
    this.centre = centre;
    this.plane = plane;
    const [x, y] = this.project(centre.map(() => 0)); // where the prior is
    const reaches = points.map((point) => Math.max(...point.map(Math.abs))).sort((a, b) => a - b);
    const most = Math.max(reaches[Math.floor(0.99 * (reaches.length - 1))] ?? 0, Math.abs(x) + PRIOR, Math.abs(y) + PRIOR);
    this.scale = SIZE / 2 / (REACH * most);
    this.posteriors = drawn("g");
    this.figure = drawn(
      "svg",
      { viewBox: `${-SIZE / 2} ${-SIZE / 2} ${SIZE} ${SIZE}`, class: "latent", role: "img" },
      drawn(
        "g",
        { class: "points" },
        ...points.map(([x, y]) => drawn("circle", { cx: x * this.scale, cy: -y * this.scale, r: 1.6 })),
      ),
      this.ellipse({ mean: centre.map(() => 0), log_var: centre.map(() => 0) }, "prior"),
      this.posteriors,
      drawn("g", { class: "labels" }, ...this.names(points, labels)),
    );
    place.replaceChildren(this.figure);
    this.show([], []);
  }

  /** @param subsets names that each posterior is of; the first is that of everything given. @param trail means it came by. */
  show(subsets, posteriors, trail = []) {
    const shapes = posteriors.map((posterior, i) => this.ellipse(posterior, i ? "alone" : "posterior")).reverse();
    const names = posteriors.slice(1).map((posterior, i) => {
      const { x, y, ry } = this.shape(posterior);
      return drawn("text", { x, y: y - ry - 4, class: "name" }, subsets[i + 1].join(" + "));
    });
    const way = trail.map((mean) => this.place(mean).join(","));
    this.posteriors.replaceChildren(
      ...shapes,
      ...names,
      way.length > 1 ? drawn("polyline", { points: way.join(" "), class: "trail" }) : "",
      posteriors.length ? drawn("circle", { ...this.dot(posteriors[0].mean), r: 3.5, class: "mean" }) : "",
    );
    this.figure.setAttribute(
      "aria-label",
      posteriors.length
        ? `Map of the latent space with the posterior given ${subsets[0].join(" and ")}`
        : "Map of the latent space with the prior",
    );
  }

  project(mean) {
    return this.plane.map((axis) => axis.reduce((sum, a, i) => sum + a * (mean[i] - this.centre[i]), 0));
  }

  /** On the screen, where y points down. */
  place(mean) {
    const [x, y] = this.project(mean);
    return [x * this.scale, -y * this.scale];
  }

  dot(mean) {
    const [cx, cy] = this.place(mean);
    return { cx, cy };
  }

  /** The Gaussian within the plane: its covariance there is plane · diag(variance) · planeᵀ. */
  shape({ mean, log_var }) {
    const covariance = (a, b) => log_var.reduce((sum, l, i) => sum + this.plane[a][i] * this.plane[b][i] * Math.exp(l), 0);
    const [xx, xy, yy] = [covariance(0, 0), -covariance(0, 1), covariance(1, 1)]; // y points down
    const [middle, half] = [(xx + yy) / 2, Math.hypot((xx - yy) / 2, xy)];
    const [x, y] = this.place(mean);
    const angle = (90 / Math.PI) * Math.atan2(2 * xy, xx - yy);
    return { x, y, rx: this.scale * Math.sqrt(middle + half), ry: this.scale * Math.sqrt(Math.max(middle - half, 0)), angle };
  }

  ellipse(posterior, kind) {
    const { x, y, rx, ry, angle } = this.shape(posterior);
    return drawn("ellipse", { rx, ry, class: kind, transform: `translate(${x} ${y}) rotate(${angle})` });
  }

  /** Each label at the middle of its points, where there are so few that they can be read. */
  names(points, labels) {
    const groups = new Map();
    labels?.forEach((label, i) => label && groups.set(label, [...(groups.get(label) ?? []), points[i]]));
    const middle = (group, axis) => group.reduce((sum, point) => sum + point[axis], 0) / group.length;
    if (groups.size > MOST_LABELS) return [];
    return [...groups].map(([label, group]) =>
      drawn("text", { x: middle(group, 0) * this.scale, y: -middle(group, 1) * this.scale }, label),
    );
  }
}
